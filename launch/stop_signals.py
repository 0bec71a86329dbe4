"""What asks a command to stop: Ctrl-C, and SIGTERM, which is how job systems say it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """While active, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread, which must be the caller.

    Set explicitly, because a process that a script starts in the background inherits an ignored SIGINT, and because
    `ray.init` makes SIGTERM end the driver at once.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
