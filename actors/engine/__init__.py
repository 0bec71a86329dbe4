"""vLLM with backspace inside: scheduler, sampling state, log-probabilities, and weights loaded between two steps."""
