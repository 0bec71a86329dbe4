"""What an actor is told of a publication: where to ask, by what token, for what."""

from __future__ import annotations

from dataclasses import dataclass, field

from buffer.collective.buckets import Layout
from buffer.collective.pair import Backend


@dataclass(frozen=True)
class OfferedPart:
    """Tensors that are sent together. number: of this part, among all that its sender ever offered."""

    number: int
    layout: Layout


@dataclass(frozen=True)
class OfferedWeights:
    """A publication that waits at its sender to be fetched.

    host, port: where the sender listens. token: who knows it may fetch. kept: tensors that are the same in every
    publication, if there are any. changed: all others.
    """

    host: str
    port: int
    token: bytes = field(repr=False)
    backend: Backend
    kept: OfferedPart | None
    changed: OfferedPart
