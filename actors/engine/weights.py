"""New weights into a running engine: every tensor in its place, and a proof that the engine computes with them.

On CPU vLLM packs each linear layer into a GEMM handle and drops the plain weight; its layerwise reload restores the
plain layout, loads, and packs again. It misses a language model head that is tied to the embedding, which keeps its own
packed copy of the *old* weights. The bytes that were sent show nothing of this; only log-probabilities do.

So each publication carries a probe: a fixed sequence, and the learner's log-probabilities of it. Learner and engine
round at different places. How far they are apart with the first weights of an engine is the noise of this pair; for
these a bound by number format stands, far below what missing weights show. Later weights are taken for loaded where the
engine is no farther from the learner's probe of them than noise explains, and nearer to it than to the probe of the
weights before. Where new and previous weights differ by less than the noise, the fingerprint alone proves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from buffer.weights import WeightHandle, WeightManifest, WeightMismatchError, WeightReceiver, unpack, verify_fingerprint

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig

    from actors.engine.engine import BackspaceEngine

NOISE_MARGIN = 4.0
"""So many times the noise is still noise: measured, a healthy engine is off by up to 1.9 times its first error."""

_HALF = frozenset({"bfloat16", "float16"})

_FIRST_LIMIT, _FIRST_LIMIT_HALF = 1e-3, 0.5
"""Largest error with the first weights. Measured: below 1e-5, and 0.002 to 0.18 where one side is in half precision."""

_LEAST_MARGIN, _LEAST_MARGIN_HALF = 2e-4, 0.02
"""By the engine's format."""

_LEAST_FRACTION_HALF = 0.04
"""Of the spread of the learner's log-probabilities. Half precision rounds in proportion to the logits, and these grow:
a model from scratch shows a noise of 0.001 nats untrained and of 0.05 trained. Measured: 0.005 to 0.02 of the spread.
"""


class ExpectedTensors:
    """Tensors of a checkpoint in Hugging Face naming, by config.json alone: the model is built without storage."""

    def __init__(self, model_dir: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, trust_remote_code=False))
        # A tied pair is one parameter; the first name stands for it, as in the model's own checkpoints.
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        # Others may come along that repeat one (tied weights) or are buffers.
        self._known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._known |= {name for name, _ in model.named_buffers()}

    def check(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Raise a ValueError that names the tensor that is missing, unknown, repeated or of the wrong shape."""
        received: set[str] = set()
        for name, tensor in tensors:
            if name in received:
                raise ValueError(f"tensor {name} came twice in one update")
            if name not in self._known:
                raise ValueError(f"tensor {name} does not belong to this model")
            received.add(name)
            shape = tuple(tensor.shape)
            if self._shapes.get(name, shape) != shape:
                raise ValueError(f"tensor {name} has shape {shape}, the model needs {self._shapes[name]}")
        missing = sorted(self._shapes.keys() - received)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"the update lacks {', '.join(missing[:3])}{more}: an engine must receive every tensor of a version"
            )


def load_in_place(model: torch.nn.Module, config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace all weights of vLLM's `model` by `tensors` (Hugging Face names, checked by `ExpectedTensors`).

    The tensors are only read and not kept. Where it raises, e.g. because vLLM left a parameter of the model unloaded,
    the model is half new: don't use it any more.
    """
    import torch
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    with torch.no_grad():
        parameters = {name for name, _ in model.named_parameters()}
        initialize_layerwise_reload(model)
        loaded: set[str] | None = model.load_weights(tensors)
        finalize_layerwise_reload(model, config)
        head = getattr(model, "lm_head", None)
        # Only a head that shares the embedding still has its plain weight after packing.
        if head is not None and hasattr(head, "cpu_linear") and head.weight.numel() > 0:
            head.quant_method.process_weights_after_loading(head)
    unloaded = parameters - loaded if loaded is not None else set()
    if unloaded:
        raise RuntimeError(f"vLLM did not load {', '.join(sorted(unloaded)[:3])} of the update")


@dataclass(frozen=True)
class Proof:
    """What the probe said of the weights that an engine has loaded. Errors and differences are root mean squares over
    the tokens of the probe, in nats.

    probe_logprobs: the learner's, of these weights. error: of the engine. noise: error with the engine's first weights.
    margin: largest error that is taken for noise. change: from the weights before; None of the first ones.
    """

    probe_logprobs: tuple[float, ...]
    error: float
    noise: float
    margin: float
    change: float | None = None

    @property
    def by_fingerprint_alone(self) -> bool:
        """The probe could not tell these weights from those before."""
        return self.change is not None and self.change <= self.margin


class WeightLoader:
    """Loads publications into one engine, between two of its steps."""

    def __init__(self, engine: BackspaceEngine) -> None:
        self._engine = engine
        self._receiver = WeightReceiver()
        self._proof: Proof | None = None

    @property
    def note(self) -> str | None:
        """What people should know of the proof: the noise of this engine, and where it hides what a push changes."""
        proof = self._proof
        if proof is not None and proof.change is None:
            return (
                f"engine and learner differ by {proof.error:.2g} nats with the same weights: up to "
                f"{proof.margin:.2g} counts as noise of this engine"
            )
        if proof is not None and proof.by_fingerprint_alone:
            return (
                f"the newest weights change the probe by less than the noise of this engine ({proof.margin:.2g} nats): "
                "the fingerprint alone proves them"
            )
        return None

    def load(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Load a publication.

        Raises:
            WeightMismatchError: the bytes changed on their way, or the engine does not compute with them.
            ValueError: they are not those of this model; and what `WeightReceiver.fetch` raises, with nothing changed.
        """
        payload = self._receiver.fetch(handle)
        verify_fingerprint(payload, manifest)
        self._engine.load_weights(unpack(payload, manifest), manifest.version)
        logprobs = self._engine.probe(manifest.probe_token_ids)
        self._proof = prove(manifest, logprobs, self._proof, self._engine.dtype)


def prove(
    manifest: WeightManifest, engine_logprobs: npt.NDArray[np.floating], before: Proof | None, engine_dtype: str
) -> Proof:
    """Judge the engine's log-probabilities [P-1] of the probe; WeightMismatchError if they are of other weights.

    before: of the weights that the engine had, which need not be those of the version before; None of its first ones.
    engine_dtype: the engine's number format, named as in the manifest.
    """
    new = np.asarray(manifest.probe_logprobs, dtype=np.float64)
    found = np.asarray(engine_logprobs, dtype=np.float64)
    if found.shape != new.shape:
        raise WeightMismatchError(
            f"probe of weights version {manifest.version}: {found.size} log-probabilities from the engine, "
            f"{new.size} from the learner"
        )
    error = _distance(found, new)
    if before is None:
        # A learner that publishes in half precision may have computed the probe in it.
        is_half = bool(_HALF & {engine_dtype, *(entry.dtype for entry in manifest.tensors)})
        limit = _FIRST_LIMIT_HALF if is_half else _FIRST_LIMIT
        if not error <= limit:  # also of what is not a number
            raise _mismatch(manifest, found, new, f"at most {limit:g} with its first weights")
        return Proof(manifest.probe_logprobs, error, error, _margin(error, new, engine_dtype))
    previous = np.asarray(before.probe_logprobs, dtype=np.float64)
    margin = _margin(before.noise, new, engine_dtype)
    proof = Proof(manifest.probe_logprobs, error, before.noise, margin, _distance(new, previous))
    to_previous = _distance(found, previous)
    if not error <= proof.margin or (error >= to_previous and not proof.by_fingerprint_alone):
        known = f"{margin:.3g} is noise of this engine; it is {to_previous:.3g} from the weights it had before"
        raise _mismatch(manifest, found, new, known)
    return proof


def _margin(noise: float, learner_logprobs: npt.NDArray[np.float64], engine_dtype: str) -> float:
    least = _LEAST_MARGIN
    if engine_dtype in _HALF:
        least = max(_LEAST_MARGIN_HALF, _LEAST_FRACTION_HALF * float(learner_logprobs.std()))
    return max(least, NOISE_MARGIN * noise)


def _distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _mismatch(
    manifest: WeightManifest, found: npt.NDArray[np.float64], new: npt.NDArray[np.float64], known: str
) -> WeightMismatchError:
    errors = np.abs(found - new)
    worst = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
    return WeightMismatchError(
        f"probe of weights version {manifest.version}: the engine is {_distance(found, new):.3g} nats from the learner "
        f"({known}), most at token {worst + 1} (engine {found[worst]:.6g}, learner {new[worst]:.6g}): the engine does "
        "not compute with the published weights"
    )
