"""The causal language model that is trained: loading it, its backspace action, adapters, 4-bit layers."""
