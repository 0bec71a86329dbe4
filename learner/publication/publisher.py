"""Publishing weights: one snapshot, one announcement, no waiting for actors."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ray.actor import ActorHandle
from torch import Tensor

from buffer.remote_call import RemoteCall
from buffer.trajectory.schema import TokenContract
from buffer.weights import (
    TensorEntry,
    WeightManifest,
    WeightPayload,
    WeightSender,
    combined_fingerprint,
    digest_tensors,
    pack_tensors,
)
from learner.publication.tensors import frozen_tensors, low_rank_updates, publication_tensors, trained_tensors
from learner.ranks.group import Ranks
from learner.settings.stages import PublishMode
from learner.state_tree.policy import TreePolicy

PROBE_TOKENS = 16
ANNOUNCE_TIMEOUT_S = 60.0


class WeightPublisher:
    """Numbers the publications of a run and announces each to the actor pool. Every rank makes the same calls; rank 0
    alone sends, a copy, so the optimizer may write to the weights as soon as `publish` returns."""

    def __init__(
        self,
        pool: ActorHandle,
        probe_token_ids: tuple[int, ...],
        first_version: int = 0,
        mode: PublishMode = "full",
        ranks: Ranks | None = None,
    ) -> None:
        """probe_token_ids: [P] fixed sequence whose log-probabilities every engine must reproduce. first_version: that
        of the next publication (beyond 0 when a run resumes). mode: see `learner.publish`."""
        self._pool = pool
        self._probe_token_ids = probe_token_ids
        self._next_version = first_version
        self._mode = mode
        self._ranks = ranks or Ranks()
        self._sender = WeightSender()
        self._static_entries: tuple[TensorEntry, ...] | None = None  # None: not sent yet
        self._static_digests: dict[str, bytes] = {}
        self._announced: RemoteCall[None] | None = None
        self.newest_times: dict[str, float] = {}
        """Seconds that each part of the newest publication held the learner. pack: merging and gathering. fingerprint:
        what is left of it after the probe, beside which it is computed. offer: the snapshot, and the call to the pool.
        """

    @property
    def newest_version(self) -> int:
        """Version of the newest publication; -1 before the first."""
        return self._next_version - 1

    def publish(self, policy: TreePolicy) -> int:
        """Publish the weights without waiting for any actor; gives their version. All ranks call this together.

        Raises:
            TimeoutError: the pool has not answered the previous announcement yet. RankLostError: another rank failed.
        """
        if self._announced is not None:
            self._announced.result(ANNOUNCE_TIMEOUT_S)
        with self._ranks.exchange("a publication"):
            self._publish(policy)
        self._next_version += 1
        return self.newest_version

    def resume_rollouts(self, first_version: int) -> None:
        """Let the pool's actors generate, with weights of `first_version` or newer."""
        if self._ranks.leads:
            self._pool.resume.remote(first_version)

    def _publish(self, policy: TreePolicy) -> None:
        started = time.perf_counter()
        alone = self._mode == "adapter"
        if self._static_entries is None:
            self._set_static(frozen_tensors(policy.model) if alone else ())
        payload, entries = self._pack(trained_tensors(policy.model) if alone else publication_tensors(policy.model))
        packed = time.perf_counter()
        with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter to the probe's forward pass
            hashing = beside.submit(digest_tensors, entries, payload)
            probe_logprobs = tuple(policy.sequence_logprobs(self._probe_token_ids).tolist())
            probed = time.perf_counter()
            digests = self._static_digests | hashing.result()
        hashed = time.perf_counter()
        if not self._ranks.leads:
            return
        manifest = WeightManifest(
            version=self._next_version,
            fingerprint=combined_fingerprint(digests),
            tensors=(*(self._static_entries or ()), *entries),
            probe_token_ids=self._probe_token_ids,
            probe_logprobs=probe_logprobs,
            updates=low_rank_updates(policy.model) if alone else (),
        )
        announced = self._pool.announce.remote(manifest, self._sender.publish(payload))
        self._announced = RemoteCall("the actor pool", announced, f"take weights version {manifest.version}")
        times = (packed - started, probed - packed, hashed - probed, time.perf_counter() - hashed)
        self.newest_times = dict(zip(("pack", "learner_probe", "fingerprint", "offer"), times, strict=True))

    def _set_static(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        payload, self._static_entries = self._pack(tensors)
        self._static_digests = digest_tensors(self._static_entries, payload)
        if payload:
            self._sender.set_static(payload)

    def _pack(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[WeightPayload, tuple[TensorEntry, ...]]:
        """At ranks other than 0 nothing is kept, but every tensor is gathered in the same order."""
        if self._ranks.leads:
            return pack_tensors(tensors)
        for _ in tensors:
            pass
        return {}, ()


def make_probe(contract: TokenContract, seed: int) -> tuple[int, ...]:
    """A fixed pseudo-random sequence of PROBE_TOKENS ids of a text: of tokens, neither backspace nor `<eos>`."""
    candidates = np.setdiff1d(np.flatnonzero(contract.has_token()), [contract.backspace_id, contract.eos_id])
    return tuple(np.random.default_rng(seed).choice(candidates, size=PROBE_TOKENS).tolist())
