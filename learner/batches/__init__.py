"""From the replay buffer to the state trees of a rank: drawing, sharing among ranks, cutting; priorities back."""
