"""Whether an actor whose constructor raised is worth another try."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors.engine.rank_group import EngineRankError
from actors.pool.ray_crew import failure_of


@pytest.mark.parametrize(
    ("cause", "in_vain"),
    [(ValueError("the engine cannot be built"), True), (EngineRankError("rank 1 of actor-0 died"), False)],
)
def test_only_a_lost_process_of_a_divided_engine_is_worth_one(cause: Exception, in_vain: bool) -> None:
    traceback = f"Traceback:\n  File ...\n{type(cause).__module__}.{type(cause).__qualname__}: {cause}"
    failure = failure_of(ActorDiedError(RayTaskError("RolloutActor.__init__", traceback, cause)), starting=True)
    assert str(cause) in failure.reason
    assert failure.in_vain is in_vain
