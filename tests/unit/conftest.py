"""For every unit test."""

from __future__ import annotations

import pytest

from buffer.experts.tasks import Task, load_task
from buffer.settings import ArithmeticTaskSettings


@pytest.fixture(scope="session")
def task() -> Task:
    """Forty questions of arithmetic on small numbers; nothing writes to it."""
    return load_task(ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4))
