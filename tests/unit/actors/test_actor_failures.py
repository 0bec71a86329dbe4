"""Whether an actor whose constructor raised is worth another try, and what is told of its traceback."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors.engine.rank_group import EngineRankError
from actors.pool.ray_pool import TRACEBACK_CHARACTERS, failure_of

COMPILER = "cvub.h:6:10: fatal error: Python.h: No such file or directory\ncompilation terminated."


@pytest.mark.parametrize(
    ("cause", "in_vain"),
    [(ValueError("the engine cannot be built"), True), (EngineRankError("rank 1 of actor-0 died"), False)],
)
def test_only_a_lost_process_of_a_divided_engine_is_worth_one(cause: Exception, in_vain: bool) -> None:
    name = type(cause).__name__ if in_vain else f"{type(cause).__module__}.{type(cause).__name__}"
    traceback = f"Traceback:\n  File ...\n{name}: {cause}"
    failure = failure_of(ActorDiedError(RayTaskError("RolloutActor.__init__", traceback, cause)), starting=True)
    assert str(cause) in failure.reason
    assert failure.in_vain is in_vain
    if in_vain:
        assert str(failure) == failure.reason, "a refusal of ours says all"


def test_the_words_of_a_compiler_are_told() -> None:
    """They stand far below the first line of the error, behind a command of many lines."""
    cause = RuntimeError(f"C++ compile error\n\nCommand:\n{'g++ -I/very/long ' * 300}\n\nOutput:\n{COMPILER}\n")
    traceback = f"ray::RolloutActor.run()\n  File ...\nRuntimeError: {cause}\n\x1b[36mSet X=1 for more\x1b[39m"
    failure = failure_of(RayTaskError("RolloutActor.run", traceback, cause), starting=False)
    assert failure.reason == "RuntimeError: C++ compile error"
    assert COMPILER in failure.traceback
    assert failure.traceback.endswith("Set X=1 for more")
    assert len(failure.traceback) <= TRACEBACK_CHARACTERS
    assert str(failure) == f"{failure.reason}; its traceback ends with\n{failure.traceback}"
