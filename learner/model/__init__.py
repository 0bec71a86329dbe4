"""The causal language model that is trained, with its backspace action, adapters and 4-bit layers where they are asked
for. What another architecture lacks is an error that names it."""
