"""How published weights travel, as a recipe says it."""

from __future__ import annotations

from typing import Literal

Transport = Literal["object_store", "collective"]
TransportChoice = Literal["object_store", "collective", "auto"]


def choose_transport(
    choice: TransportChoice, learner_gpus: float, actor_gpus: float, actor_processes: int
) -> Transport:
    """What `learner.transport` comes to, given the GPUs of each learner rank and of each process of an actor.

    Raises:
        ValueError: `collective` cannot work between them.
    """
    whole = learner_gpus >= 1.0 and actor_gpus >= 1.0
    if choice == "auto":
        return "collective" if whole and actor_processes == 1 else "object_store"
    if choice == "collective" and actor_processes > 1:
        raise ValueError(
            "learner.transport=collective sends to one process per actor, of which there are "
            f"actors.tensor_parallel_size={actor_processes}: set learner.transport=object_store"
        )
    if choice == "collective" and learner_gpus > 0.0 and not whole:
        raise ValueError(
            f"learner.transport=collective sends from GPU to GPU by NCCL, which needs a whole one at both ends "
            f"(learner.num_gpus={learner_gpus:g}, actors.num_gpus={actor_gpus:g}): give each at least 1, or set "
            "learner.transport=object_store"
        )
    return choice
