"""An asyncio event loop on a clock of its own: nobody waits, time jumps to whatever is due next.

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())  # `asyncio.sleep(3600)` takes no time; `loop.time()` tells the hour

What runs on it is the code that runs on any other loop: coroutines, locks, conditions, time-outs. Calls that are due at
the same moment run in the order in which they were asked for, so that equal programs have equal histories.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike


class _JumpingSelector(selectors.BaseSelector):
    """Where the loop would wait for files until a time-out, the time-out has passed."""

    def __init__(self) -> None:
        self._files = selectors.DefaultSelector()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task of the simulation waits for another: nothing is due at any time")
        self.now_s += max(timeout, 0.0)
        return self._files.select(0)

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        return self._files.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._files.unregister(fileobj)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._files.get_map()

    def close(self) -> None:
        self._files.close()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Begins at 0 seconds. Not for code that waits for threads, processes or the network.

    A program in which nothing is due ends with a RuntimeError, not in an endless wait.
    """

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the beginning."""
        return self._jumping.now_s
