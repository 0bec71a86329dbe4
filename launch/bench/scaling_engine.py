"""An engine that does not compute: rollouts of given lengths that last as long as the engine's steps are said to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from actors.engine.action_log import FinishedLog
from launch.bench.buffer_load import FIRST_TEXT_ID
from launch.bench.scaling_times import StepTimes

Int64 = npt.NDArray[np.int64]


class SimulatedEngine:
    """One action per rollout and step. The calls are those of `actors.engine.engine.BackspaceEngine`; time is the
    caller's.
    """

    def __init__(self, times: StepTimes, id_prefix: str, seed: tuple[int, ...]) -> None:
        """id_prefix: of the ids of its rollouts. seed: of their lengths."""
        self._times = times
        self._id_prefix = id_prefix
        self._lengths = np.array(times.actions_per_rollout)
        self._generator = np.random.default_rng(seed)
        longest = int(self._lengths.max())
        self._actions = np.full(longest, FIRST_TEXT_ID, np.int32)
        self._logprobs = np.full(longest, -0.5, np.float32)
        self._prompt = self._actions[:1]
        self._step = 0
        self._first_step: Int64 = np.zeros(0, np.int64)
        self._end_step: Int64 = np.zeros(0, np.int64)
        self._num_new = 0
        self._num_finished = 0
        self._version_since: list[tuple[int, int]] = []  # (first step, version), oldest first

    @property
    def num_unfinished(self) -> int:
        """Rollouts under way."""
        return len(self._end_step)

    def load_weights(self, version: int) -> None:
        """The actions from now on are of these weights."""
        self._version_since.append((self._step, version))

    def add(self, count: int) -> None:
        """Begin rollouts."""
        ends = self._step + self._generator.choice(self._lengths, count)
        self._first_step = np.append(self._first_step, np.full(count, self._step))
        self._end_step = np.append(self._end_step, ends)
        self._num_new += count

    def next_step_s(self) -> float:
        """How long the next step takes."""
        return self._times.decode_s(self.num_unfinished, self._num_new)

    def step(self) -> list[FinishedLog]:
        """One action more for every rollout; gives those that end with it."""
        self._step += 1
        self._num_new = 0
        ends = self._end_step == self._step
        logs = [self._finished(int(first)) for first in self._first_step[ends]]
        self._first_step, self._end_step = self._first_step[~ends], self._end_step[~ends]
        return logs

    def _finished(self, first_step: int) -> FinishedLog:
        length = self._step - first_step
        self._num_finished += 1
        return FinishedLog(
            request_id=f"{self._id_prefix}-{self._num_finished}",
            prompt_ids=self._prompt,
            actions=self._actions[:length],
            logprobs=self._logprobs[:length],
            policy_version=self._versions(first_step),
            finish_reason="max_actions",
        )

    def _versions(self, first_step: int) -> npt.NDArray[np.int32]:
        """Of each action since `first_step`."""
        versions = np.empty(self._step - first_step, np.int32)
        end = len(versions)
        for since, version in reversed(self._version_since):
            begin = max(since - first_step, 0)
            versions[begin:end] = version
            end = min(end, begin)
            if begin == 0:
                break
        return versions
