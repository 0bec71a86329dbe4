"""What a checkpoint holds, its files in Hugging Face format, where it lies and how it is written beside training."""
