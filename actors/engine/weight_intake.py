"""From the announcement of a publication to an engine that is proven to compute with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.engine.probe_check import Proof, prove
from buffer.weights.format import WeightManifest, unpack, verify_fingerprint
from buffer.weights.object_store import WeightHandle, WeightReceiver

if TYPE_CHECKING:
    from actors.engine.engine import BackspaceEngine


class WeightIntake:
    """Loads publications into one engine, between two of its steps.

    proof: of the weights that the engine has; None before the first ones.
    """

    def __init__(self, engine: BackspaceEngine) -> None:
        self._engine = engine
        self._receiver = WeightReceiver()
        self.proof: Proof | None = None

    @property
    def note(self) -> str | None:
        """What people should know of the proof: the noise of this engine, and where it hides what a push changes."""
        proof = self.proof
        if proof is None:
            return None
        if proof.change is None:
            return (
                f"engine and learner differ by {proof.error:.2g} nats with the same weights: up to "
                f"{proof.margin:.2g} counts as noise of this engine"
            )
        if proof.by_fingerprint_alone:
            return (
                f"the newest weights change the probe by less than the noise of this engine ({proof.margin:.2g} nats): "
                "the fingerprint alone proves them"
            )
        return None

    def take(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Load a publication.

        Raises:
            WeightMismatchError: the bytes changed on their way, or the engine does not compute with them.
            ValueError: they are not those of this model; and what `WeightReceiver.fetch` raises, with nothing changed.
        """
        payload = self._receiver.fetch(handle)
        verify_fingerprint(payload, manifest)
        self._engine.load_weights(unpack(payload, manifest), manifest.version)
        logprobs = self._engine.probe(manifest.probe_token_ids)
        self.proof = prove(manifest, logprobs, self.proof, self._engine.dtype)
