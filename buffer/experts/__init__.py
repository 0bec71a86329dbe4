"""Expert trajectories: Hugging Face data sets turned into action logs, with backspace demonstrations."""
