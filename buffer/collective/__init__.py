"""Weights from the learner's memory to an actor's by torch.distributed: NCCL between GPUs, gloo between CPUs.

Each transfer is a process group of two ranks, made for it and gone after it, so one with a slow or dead actor is
nobody else's business. `sender` is the learner's end, `receiver` an actor's; `control` is what they say to each other
before and between the buckets of bytes.
"""
