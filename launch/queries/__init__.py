"""`sequencematch query` and `audit`: SQL over the replay buffer of a run, and the account of its rows."""
