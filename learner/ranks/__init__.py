"""The processes that take a step together. FSDP2 shards weights, gradients and optimizer state among them. An error
says which rank is lost.
"""
