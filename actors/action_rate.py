"""Actions per second of an actor: `run` adds, the threads of the control group ask."""

from __future__ import annotations

from collections import deque
from threading import Lock


class ActionRate:
    """The mean over the last seconds; safe to call from several threads."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._counts: deque[tuple[float, int]] = deque()
        self._lock = Lock()

    def add(self, now_s: float, actions: int) -> None:
        """Rollouts have ended. actions: since the actor's start."""
        with self._lock:
            self._counts.append((now_s, actions))

    def per_s(self, now_s: float, actions: int) -> float:
        """Since the oldest count in the window, or the newest one where all are older. actions: see `add`."""
        with self._lock:
            while len(self._counts) > 1 and now_s - self._counts[0][0] > self._window_s:
                self._counts.popleft()
            if not self._counts:
                return 0.0
            start_s, before = self._counts[0]
        return (actions - before) / max(now_s - start_s, 1e-9)
