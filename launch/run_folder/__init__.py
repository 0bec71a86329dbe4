"""What lies in the folder of a run, and how a command finds it."""
