"""The weights on their way from the learner to the actors, through the memory of Ray's object store.

One publication is a `WeightManifest` (small, sent to everyone) and a `WeightPayload` (large, stored once per node as
one object of plain arrays, so that readers map it without a copy). The fingerprint proves that the bytes arrived. The
probe proves that the *engine* computes with them, which bytes alone cannot (engines repack and tie weights).

An actor fetches the payload when it wants it, so the learner never waits for an actor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from buffer.processes import RemoteCall

if TYPE_CHECKING:
    import ray
    import torch

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
WeightPayload = dict[str, Array]
"""Tensor name -> C-contiguous array. Types that numpy lacks travel as unsigned integers of the same width."""

_CARRIER_DTYPES = {
    **{name: name for name in ("float32", "float16", "float64", "int64", "int32", "uint8", "bool")},
    "bfloat16": "uint16",
}
"""torch dtype name -> numpy dtype that carries its bytes."""

FETCH_TIMEOUT_S = 60.0


class WeightMismatchError(RuntimeError):
    """Received weights, or the engine that loaded them, disagree with what the learner published."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a publication. dtype: torch name without `torch.`, e.g. `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LowRankUpdate:
    """A low-rank update (LoRA, arXiv 2106.09685) by the names of its tensors: W [out, in], A [rank, in], B [out, rank].
    transposed: W is stored as [in, out], as GPT-2 does."""

    weight: str
    a: str
    b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class WeightManifest:
    """What a publication contains.

    version: number of publications so far, 0 = the initial model; grows by one with each publication.
    fingerprint: `fingerprint()` of the payload.
    tensors: every tensor of the payload; of tied tensors only the first.
    updates: what is merged into a tensor of the payload when it is unpacked. The fingerprint is of the tensors that
        travel, since the sum of W and B A may round differently on another kind of processor; the probe is of the sum.
    probe_token_ids: [P] a fixed sequence; probe_logprobs: [P-1] log-probability of each token after the first
        given those before it, under these weights, computed by the learner.
    """

    version: int
    fingerprint: str
    tensors: tuple[TensorEntry, ...]
    probe_token_ids: tuple[int, ...]
    probe_logprobs: tuple[float, ...]
    updates: tuple[LowRankUpdate, ...] = ()

    def __post_init__(self) -> None:
        if self.version < 0:
            raise ValueError(f"weight version {self.version} is negative; the initial model is version 0")
        num_predicted = max(len(self.probe_token_ids) - 1, 0)
        if len(self.probe_logprobs) != num_predicted:
            raise ValueError(
                f"a probe of {len(self.probe_token_ids)} tokens needs {num_predicted} log-probabilities, "
                f"not {len(self.probe_logprobs)}"
            )


def pack_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[WeightPayload, tuple[TensorEntry, ...]]:
    """View named tensors as arrays, one after the other; tied ones must come under one name only.

    Contiguous tensors in host memory are *not* copied: put the payload in the object store (which copies)
    before the next optimizer step writes to them. Of others (made on the fly, on a device) the payload keeps the only
    host copy, so beside it one tensor exists at a time.

    Raises:
        ValueError: a name comes twice, or a tensor has a dtype that the format does not carry.
    """
    import torch

    payload: WeightPayload = {}
    entries: list[TensorEntry] = []
    for name, parameter in tensors:
        if name in payload:
            raise ValueError(f"tensor {name} came twice; every tensor is published under one name")
        entry = TensorEntry(name, str(parameter.dtype).removeprefix("torch."), tuple(parameter.shape))
        if (carrier := _CARRIER_DTYPES.get(entry.dtype)) is None:
            raise ValueError(f"tensor {name} is {entry.dtype}; weights travel as one of {', '.join(_CARRIER_DTYPES)}")
        entries.append(entry)
        payload[name] = np.asarray(parameter.detach().cpu().contiguous().view(getattr(torch, carrier)).numpy())
    return payload, tuple(entries)


def digest_tensors(entries: Iterable[TensorEntry], payload: WeightPayload) -> dict[str, bytes]:
    """xxh3-128 of name, dtype, shape and bytes of each tensor."""
    digests: dict[str, bytes] = {}
    for entry in entries:
        digest = xxhash.xxh3_128(f"{entry.name}\0{entry.dtype}\0{entry.shape}\0".encode())
        digest.update(np.ascontiguousarray(payload[entry.name]).reshape(-1).view(np.uint8).data)
        digests[entry.name] = digest.digest()
    return digests


def combined_fingerprint(digests: Mapping[str, bytes]) -> str:
    """xxh3-128 over the digests of `digest_tensors`, ordered by name."""
    return xxhash.xxh3_128(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def fingerprint(entries: Iterable[TensorEntry], payload: WeightPayload) -> str:
    """Of names, dtypes, shapes and bytes: equal tensors have equal fingerprints, in whatever order they come."""
    return combined_fingerprint(digest_tensors(entries, payload))


def verify_fingerprint(payload: WeightPayload, manifest: WeightManifest) -> None:
    """WeightMismatchError where a tensor is missing, extra or mis-shaped, or bytes differ from the published ones."""
    _check_complete(payload, manifest)
    found = fingerprint(manifest.tensors, payload)
    if found != manifest.fingerprint:
        raise WeightMismatchError(
            f"weights of version {manifest.version} have fingerprint {found}, published was {manifest.fingerprint}: "
            "the bytes changed on their way"
        )


def unpack(payload: WeightPayload, manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs as a model's `load_weights` takes them, low-rank updates merged; all others are views of the
    payload: never write to them. Raises as `verify_fingerprint`, at the call, before anything is loaded."""
    import torch

    _check_complete(payload, manifest)
    tensors: dict[str, torch.Tensor] = {}
    with warnings.catch_warnings():
        # Arrays mapped from an object store are read-only, which torch cannot express and warns about.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for entry in manifest.tensors:
            tensors[entry.name] = torch.from_numpy(payload[entry.name]).view(getattr(torch, entry.dtype))
    return _merged(tensors, manifest.updates)


def merge_low_rank(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool
) -> torch.Tensor:
    """W + scaling B A, added in the format of A and B and rounded once to that of W; a new tensor.

    Learner, exports and actors all merge by this function, so that they get the same bits from the same tensors.
    """
    update = (b @ a) * scaling
    if transposed:
        update = update.T
    return (weight.to(update.dtype) + update).to(weight.dtype)


def _merged(tensors: dict[str, torch.Tensor], updates: tuple[LowRankUpdate, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    by_weight = {update.weight: update for update in updates}
    factors = {name for update in updates for name in (update.a, update.b)}
    for name, tensor in tensors.items():
        if (update := by_weight.get(name)) is not None:
            a, b = tensors[update.a], tensors[update.b]
            yield name, merge_low_rank(tensor, a, b, update.scaling, update.transposed)
        elif name not in factors:
            yield name, tensor


def _check_complete(payload: WeightPayload, manifest: WeightManifest) -> None:
    expected = {entry.name: (_CARRIER_DTYPES.get(entry.dtype), entry.shape) for entry in manifest.tensors}
    found = {name: (array.dtype.name, array.shape) for name, array in payload.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise WeightMismatchError(
            f"weights of version {manifest.version}: tensor {first} arrived as {found.get(first, 'nothing')}, and the "
            f"manifest says {expected.get(first, 'nothing')}; {len(wrong)} of {len(expected)} tensors are wrong"
        )


@dataclass(frozen=True)
class WeightHandle:
    """Where a publication lies in Ray's object store; only an actor that needs the references fetches them. static:
    tensors that are the same in every publication of this sender, if there are any. changed: all others."""

    static: ray.ObjectRef[WeightPayload] | None
    changed: ray.ObjectRef[WeightPayload]


class WeightSender:
    """The learner's end. It copies into the shared memory of its node; Ray copies that to another node once, when an
    actor there asks. The newest publication is kept alive here for actors that start later.
    """

    def __init__(self) -> None:
        self._static: ray.ObjectRef[WeightPayload] | None = None
        self._newest: WeightHandle | None = None

    def set_static(self, tensors: WeightPayload) -> None:
        """Make `tensors` part of every later publication; they travel once."""
        import ray

        self._static = ray.put(tensors)

    def publish(self, tensors: WeightPayload) -> WeightHandle:
        """Copy `tensors`, which may be written to as soon as this returns. Any number of actors can fetch the copy."""
        import ray

        self._newest = WeightHandle(self._static, ray.put(tensors))
        return self._newest


class WeightReceiver:
    """An actor's end. It maps the arrays where they lie in this node's shared memory, without a copy."""

    def __init__(self, timeout_s: float = FETCH_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._static: tuple[ray.ObjectRef[WeightPayload], WeightPayload] | None = None

    def fetch(self, handle: WeightHandle) -> WeightPayload:
        """What was published, read-only. Static tensors stay mapped, so this node never has to fetch them again.
        TimeoutError where it did not arrive in time, ProcessLostError where it was lost with the learner."""
        if handle.static is None:
            self._static = None
            return self._get(handle.changed)
        if self._static is None or self._static[0] != handle.static:
            self._static = (handle.static, self._get(handle.static))
        return self._static[1] | self._get(handle.changed)

    def _get(self, reference: ray.ObjectRef[WeightPayload]) -> WeightPayload:
        task = "give its weights through Ray's object store"
        call: RemoteCall[WeightPayload] = RemoteCall("the learner", reference, task)
        return call.result(self._timeout_s)
