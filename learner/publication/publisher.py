"""Publishing weights: one snapshot, one announcement, no waiting for actors."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
import ray
from ray.actor import ActorHandle

from buffer.trajectory.schema import TokenContract
from buffer.weights.format import TensorEntry, WeightManifest, combined_fingerprint, digest_tensors, pack_tensors
from buffer.weights.object_store import WeightSender
from learner.publication.tensors import PublicationPlan
from learner.state_tree.policy import TreePolicy

PROBE_TOKENS = 16
ANNOUNCE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PublicationTimes:
    """Seconds that the learner was held by each part of a publication.

    pack_s: making the tensors (merging, gathering). fingerprint_s: what is left of it after the probe, beside which it
    is computed. offer_s: the snapshot, and telling the pool.
    """

    pack_s: float
    probe_s: float
    fingerprint_s: float
    offer_s: float


class WeightPublisher:
    """Numbers the publications of a run and tells the actor pool of each.

    The sender takes a snapshot, so the optimizer may write to the weights as soon as `publish` returns.
    """

    def __init__(
        self,
        pool: ActorHandle,
        probe_token_ids: tuple[int, ...],
        first_version: int = 0,
        plan: PublicationPlan | None = None,
    ) -> None:
        """Args:
        probe_token_ids: [P] fixed sequence whose log-probabilities every engine must reproduce.
        first_version: version of the next publication (beyond 0 when a run resumes).
        plan: which tensors travel; None = all of them, each time.
        """
        self._pool = pool
        self._probe_token_ids = probe_token_ids
        self._next_version = first_version
        self._plan = plan or PublicationPlan("full")
        self._kept_entries: tuple[TensorEntry, ...] = ()
        self._kept_digests: dict[str, bytes] = {}
        self._sender = WeightSender()
        self._announced: ray.ObjectRef[None] | None = None
        self._times: PublicationTimes | None = None

    @property
    def newest_version(self) -> int:
        """Version of the newest publication; -1 before the first."""
        return self._next_version - 1

    @property
    def newest_times(self) -> PublicationTimes | None:
        """What the newest publication cost the learner; None before the first."""
        return self._times

    def publish(self, policy: TreePolicy) -> WeightManifest:
        """Publish the weights under the next version and return without waiting for any actor.

        Ranks that share the model take part (`take_part_in_publication`).

        Raises:
            TimeoutError: the pool has not answered the previous announcement yet.
        """
        self._check_last_announcement()
        started = time.perf_counter()
        self._keep(policy)
        payload, entries = pack_tensors(self._plan.changed(policy.model))
        packed = time.perf_counter()
        with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter to the probe's forward pass
            hashing = beside.submit(digest_tensors, entries, payload)
            probe_logprobs = tuple(policy.sequence_logprobs(self._probe_token_ids).tolist())
            probed = time.perf_counter()
            digests = self._kept_digests | hashing.result()
        hashed = time.perf_counter()
        manifest = WeightManifest(
            version=self._next_version,
            fingerprint=combined_fingerprint(digests),
            tensors=(*self._kept_entries, *entries),
            probe_token_ids=self._probe_token_ids,
            probe_logprobs=probe_logprobs,
            updates=self._plan.updates(policy.model),
        )
        self._announced = self._pool.announce.remote(manifest, self._sender.publish(payload))
        self._times = PublicationTimes(packed - started, probed - packed, hashed - probed, time.perf_counter() - hashed)
        self._next_version += 1
        return manifest

    def resume_rollouts(self, first_version: int) -> None:
        """Let the pool's actors generate, with weights of `first_version` or newer."""
        self._pool.resume.remote(first_version)

    def _keep(self, policy: TreePolicy) -> None:
        payload, entries = pack_tensors(self._plan.kept(policy.model))
        if entries:
            self._sender.set_static(payload)
            self._kept_entries, self._kept_digests = entries, digest_tensors(entries, payload)

    def _check_last_announcement(self) -> None:
        if self._announced is not None:
            try:
                ray.get(self._announced, timeout=ANNOUNCE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                raise TimeoutError(
                    f"the actor pool did not take weights version {self.newest_version} within "
                    f"{ANNOUNCE_TIMEOUT_S:.0f} s"
                ) from None


def take_part_in_publication(policy: TreePolicy, probe_token_ids: tuple[int, ...], plan: PublicationPlan) -> None:
    """What the ranks other than 0 do while rank 0 publishes: give their parts of every tensor, in the same order."""
    for _ in chain(plan.kept(policy.model), plan.changed(policy.model)):
        pass
    policy.sequence_logprobs(probe_token_ids)


def make_probe(contract: TokenContract, seed: int) -> tuple[int, ...]:
    """A fixed pseudo-random sequence of PROBE_TOKENS ids of a text: of tokens, neither backspace nor `<eos>`."""
    candidates = np.setdiff1d(np.flatnonzero(contract.has_token()), [contract.backspace_id, contract.eos_id])
    return tuple(np.random.default_rng(seed).choice(candidates, size=PROBE_TOKENS).tolist())
