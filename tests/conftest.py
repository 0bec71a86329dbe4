"""For every test."""

import sys

import pytest

import launch  # noqa: F401  # sets what Ray reads once, when it is first imported, so before any test module does


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts torch's random numbers anew, so that what it meets does not hang on which ran before it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
