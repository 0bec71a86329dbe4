"""For every test."""

import signal
import sys

import pytest

import launch  # noqa: F401  # sets what Ray reads once, when it is first imported, so before any test module does

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script that runs this in the background makes it ignore SIGINT, and what is started from here would inherit
    # that: tests of Ctrl-C would wait in vain. A handler that does nothing is not inherited.
    signal.signal(signal.SIGINT, lambda *_: None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts torch's random numbers anew, so that what it meets does not hang on which ran before it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
