"""The processes that take a step together, and how they share weights, gradients and optimizer state (FSDP2)."""
