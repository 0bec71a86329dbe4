"""What a checkpoint holds and where it lies: weights in Hugging Face's format, beside the state that an exact resume
needs."""
