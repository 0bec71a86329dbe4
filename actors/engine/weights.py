"""Loads new weights into a running engine and proves that the engine computes with them.

On CPU vLLM packs each linear layer into a GEMM handle and drops the plain weight; its layerwise reload restores the
plain layout, loads, and packs again. It misses a language model head that is tied to the embedding, which keeps its own
packed copy of the *old* weights. A check of the sent bytes cannot detect this; only log-probabilities can.

So each publication carries a probe: a fixed sequence, and the learner's log-probabilities of it. Learner and engine
round differently. Their difference with the first weights of an engine is the noise of this pair. A limit by number
format applies to it, far below the effect of missing weights. Later weights count as loaded if the engine's distance to
the learner's probe is within the noise, and smaller than its distance to the probe of the previous weights. Where new
and previous weights differ by less than the noise, the fingerprint alone proves them.
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
"""Errors up to this multiple of the noise are allowed; measured: up to 1.9 times the first error."""

_HALF = frozenset({"bfloat16", "float16"})

_FIRST_LIMIT, _FIRST_LIMIT_HALF = 1e-3, 0.5
"""Largest error with the first weights. Measured: below 1e-5; in half precision 0.002 to 0.18."""

_LEAST_MARGIN, _LEAST_MARGIN_HALF = 2e-4, 0.02
"""Smallest margins, by the engine's format."""

_LEAST_FRACTION_HALF = 0.04
"""Smallest margin as a fraction of the standard deviation of the learner's log-probabilities. Half precision rounds
in proportion to the logits, which grow in training: a model from scratch had 0.001 nats of noise, and 0.05 trained.
Measured: 0.005 to 0.02.
"""


class ExpectedTensors:
    """The tensors of a checkpoint, by Hugging Face name, from config.json alone; no storage is allocated."""

    def __init__(self, model_dir: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, trust_remote_code=False))
        # A tied pair is one parameter; the first name stands for it, as in the model's own checkpoints.
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        # An update may also have the second name of a tied pair, or buffers.
        self._known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._known |= {name for name, _ in model.named_buffers()}

    def check(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """ValueError that names a tensor that is missing, unknown, repeated or of the wrong shape."""
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

    The tensors are read and not kept. After an error, for example because vLLM did not load a parameter, the model is
    a mixture of old and new weights and must not be used.
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
    """Result of the probe for the loaded weights of an engine. Errors and differences are root mean squares over
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
        """Whether the probe cannot distinguish these weights from the previous ones."""
        return self.change is not None and self.change <= self.margin


class WeightLoader:
    """Loads publications into one engine, between two of its steps."""

    def __init__(self, engine: BackspaceEngine) -> None:
        self._engine = engine
        self._receiver = WeightReceiver()
        self._proof: Proof | None = None

    @property
    def note(self) -> str | None:
        """A remark for users: the noise of this engine, or that it exceeds the change of the newest weights."""
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
            ValueError: they belong to another model. Also raises as `WeightReceiver.fetch`. Nothing is changed then.
        """
        payload = self._receiver.fetch(handle)
        verify_fingerprint(payload, manifest)
        self._engine.load_weights(unpack(payload, manifest), manifest.version)
        logprobs = self._engine.probe(manifest.probe_token_ids)
        self._proof = prove(manifest, logprobs, self._proof, self._engine.dtype)


def prove(
    manifest: WeightManifest, engine_logprobs: npt.NDArray[np.floating], before: Proof | None, engine_dtype: str
) -> Proof:
    """Check the engine's log-probabilities [P-1] of the probe; WeightMismatchError if they belong to other weights.

    before: proof of the engine's previous weights (versions may be skipped); None for its first weights.
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
        if not error <= limit:  # also if it is nan
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
