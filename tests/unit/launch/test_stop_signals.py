"""A stop reaches a command however it was started."""

from __future__ import annotations

import os
import signal

import pytest

from launch.stop_signals import STOP_SIGNALS, stop_signals_interrupt


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_reaches_a_process_born_with_the_signal_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), stop_signals_interrupt():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
