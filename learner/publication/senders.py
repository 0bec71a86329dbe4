"""Which transport the weights take, by where their two ends are."""

from __future__ import annotations

import ray
import torch

from buffer.collective.sender import CollectiveSender
from buffer.weight_transport import ObjectStoreSender, WeightSender
from learner.settings.transport import Transport


def make_sender(transport: Transport, device: torch.device) -> WeightSender:
    """The learner's end. device: where its weights are."""
    if transport == "object_store":
        return ObjectStoreSender()
    return CollectiveSender(ray.util.get_node_ip_address(), device)
