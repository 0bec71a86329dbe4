"""Whether an actor whose constructor raised is worth another try, and what is told of its traceback."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors.engine.rank_group import EngineRankError
from actors.pool.ray_pool import TRACEBACK_CHARACTERS, failure_of

COMPILER = "cvub.h:6:10: fatal error: Python.h: No such file or directory\ncompilation terminated."


def task_error(cause: Exception, traceback: str) -> RayTaskError:
    return RayTaskError("RolloutActor.run", traceback, cause)


@pytest.mark.parametrize(
    ("cause", "in_vain"),
    [(ValueError("the engine cannot be built"), True), (EngineRankError("rank 1 of actor-0 died"), False)],
)
def test_only_a_lost_process_of_a_divided_engine_is_worth_one(cause: Exception, in_vain: bool) -> None:
    traceback = f"Traceback:\n  File ...\n{type(cause).__module__}.{type(cause).__qualname__}: {cause}"
    failure = failure_of(ActorDiedError(RayTaskError("RolloutActor.__init__", traceback, cause)), starting=True)
    assert str(cause) in failure.reason
    assert failure.in_vain is in_vain


def test_a_refusal_of_ours_says_all() -> None:
    cause = ValueError("one text of 9 tokens needs more")
    died = ActorDiedError(RayTaskError("RolloutActor.__init__", f"Traceback:\n  File ...\nValueError: {cause}", cause))
    assert str(failure_of(died, starting=True)) == "ValueError: one text of 9 tokens needs more"


def test_the_words_of_a_compiler_are_told() -> None:
    """They stand far below the first line of the error, behind a command of many lines."""
    cause = RuntimeError(f"C++ compile error\n\nCommand:\n{'g++ -I/very/long ' * 300}\n\nOutput:\n{COMPILER}\n")
    traceback = f"\x1b[36mray::RolloutActor.run()\x1b[39m\n  File ...\nRuntimeError: {cause}\nSet X=1 for more"
    failure = failure_of(task_error(cause, traceback), starting=False)
    assert failure.reason == "RuntimeError: C++ compile error"
    assert COMPILER in failure.traceback
    assert failure.traceback.endswith("Set X=1 for more")
    assert len(failure.traceback) <= TRACEBACK_CHARACTERS
    assert str(failure) == f"{failure.reason}; its traceback ends with\n{failure.traceback}"


def test_a_short_traceback_is_told_whole_and_without_colors() -> None:
    failure = failure_of(task_error(KeyError("x"), "\x1b[36mray::run()\x1b[39m\n  File 'a'\nKeyError: 'x'"), False)
    assert failure.traceback == "ray::run()\n  File 'a'\nKeyError: 'x'"
