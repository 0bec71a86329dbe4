"""From the announcement of a publication to an engine that is proven to compute with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffer.weight_transport import WeightHandle, WeightReceiver
from buffer.weights import WeightManifest, check_probe, unpack, verify_fingerprint

if TYPE_CHECKING:
    from actors.engine.engine import BackspaceEngine


def take_weights(
    engine: BackspaceEngine,
    receiver: WeightReceiver,
    manifest: WeightManifest,
    handle: WeightHandle,
    probe_tolerance: float,
) -> None:
    """Load a publication into `engine`, between two of its steps.

    probe_tolerance: largest difference of the probe's log-probabilities, in nats.

    Raises:
        WeightMismatchError: the bytes changed on their way, or the engine does not compute with them.
        ValueError: they are not those of this model; and what `WeightReceiver.take` raises, with nothing changed.
    """
    payload = receiver.take(handle)
    verify_fingerprint(payload, manifest)
    engine.load_weights(unpack(payload, manifest), manifest.version)
    check_probe(manifest, engine.probe(manifest.probe_token_ids), probe_tolerance)
