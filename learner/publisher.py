"""Publishing weights: one copy into the object store, one announcement, no waiting for actors."""

from __future__ import annotations

import numpy as np
import ray
from ray.actor import ActorHandle

from buffer.weights import WeightManifest, WeightPayload, fingerprint, pack_tensors
from learner.publication import publication_tensors
from learner.tree_policy import TreePolicy

PROBE_TOKENS = 16
ANNOUNCE_TIMEOUT_S = 60.0


class WeightPublisher:
    """Numbers the publications of a run and tells the actor pool of each.

    The object store takes the snapshot: `ray.put` copies the tensors once (and once per further node that asks), so
    the optimizer may write to them as soon as `publish` returns. The newest payload is kept alive here.
    """

    def __init__(self, pool: ActorHandle, probe_token_ids: tuple[int, ...], first_version: int = 0) -> None:
        """Args:
        probe_token_ids: [P] fixed sequence whose log-probabilities every engine must reproduce.
        first_version: version of the next publication (beyond 0 when a run resumes).
        """
        self._pool = pool
        self._probe_token_ids = probe_token_ids
        self._next_version = first_version
        self._payload: ray.ObjectRef[WeightPayload] | None = None
        self._announced: ray.ObjectRef[None] | None = None

    @property
    def newest_version(self) -> int:
        """Version of the newest publication; -1 before the first."""
        return self._next_version - 1

    def publish(self, policy: TreePolicy) -> WeightManifest:
        """Publish the weights under the next version and return without waiting for any actor.

        Ranks that share the model take part (`take_part_in_publication`).

        Raises:
            TimeoutError: the pool has not answered the previous announcement yet.
        """
        self._check_last_announcement()
        payload, entries = pack_tensors(publication_tensors(policy.model))
        manifest = WeightManifest(
            version=self._next_version,
            fingerprint=fingerprint(entries, payload),
            tensors=entries,
            probe_token_ids=self._probe_token_ids,
            probe_logprobs=tuple(policy.sequence_logprobs(self._probe_token_ids).tolist()),
        )
        self._payload = ray.put(payload)
        self._announced = self._pool.announce.remote(manifest, [self._payload])
        self._next_version += 1
        return manifest

    def resume_rollouts(self, first_version: int) -> None:
        """Let the pool's actors generate, with weights of `first_version` or newer."""
        self._pool.resume.remote(first_version)

    def _check_last_announcement(self) -> None:
        if self._announced is not None:
            try:
                ray.get(self._announced, timeout=ANNOUNCE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                raise TimeoutError(
                    f"the actor pool did not take weights version {self.newest_version} within "
                    f"{ANNOUNCE_TIMEOUT_S:.0f} s"
                ) from None


def take_part_in_publication(policy: TreePolicy, probe_token_ids: tuple[int, ...]) -> None:
    """What the ranks other than 0 do while rank 0 publishes: give their parts of every tensor, in the same order."""
    for _ in publication_tensors(policy.model):
        pass
    policy.sequence_logprobs(probe_token_ids)


def make_probe(vocab_size: int, excluded: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """A fixed pseudo-random sequence of PROBE_TOKENS ids that avoids `excluded` (backspace never stands in a text)."""
    candidates = np.setdiff1d(np.arange(vocab_size), np.array(excluded))
    return tuple(np.random.default_rng(seed).choice(candidates, size=PROBE_TOKENS).tolist())
