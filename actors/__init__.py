"""Rollout actors: vLLM engines in which the model can take tokens back."""
