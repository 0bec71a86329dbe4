"""A reward that always raises, and one that never returns: the run ends, and its error names the scorer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration import failing_scores
from tests.integration.train_process import ARITHMETIC, ROOT, TINY, TrainProcess

pytestmark = pytest.mark.slow

RUN_TIMEOUT_S = 200.0
OVERRIDES = (
    *TINY,
    "stages.pretrain.steps=2",
    "stages.sequencematch.objective={name: reinforce}",
    "scoring.timeout_s=1",
    "actors.max_restarts=1",
)


@pytest.mark.parametrize(
    ("scorer", "data_timeout_s", "what", "why"),
    [
        ("AlwaysRaises", 40, "the actors dropped ", " raised RuntimeError: no connection to the judge"),
        # An actor has to start twice before the learner ceases to wait.
        (
            "NeverReturns",
            RUN_TIMEOUT_S,
            "actor-0 failed 2 times in a row",
            " did not return within scoring.timeout_s=1",
        ),
    ],
)
def test_the_scorer_that_keeps_rollouts_from_the_buffer_is_named(
    tmp_path: Path, scorer: str, data_timeout_s: float, what: str, why: str
) -> None:
    name = f"{failing_scores.__name__}:{scorer}"
    overrides = (
        *OVERRIDES,
        f"learner.data_timeout_s={data_timeout_s}",
        f"scoring.reward={{name: custom, path: '{name}'}}",
    )
    environment = os.environ | {"SEQUENCEMATCH_TRUSTED_MODULES": failing_scores.__name__, "PYTHONPATH": str(ROOT)}
    with TrainProcess(tmp_path, ARITHMETIC, "--no-evaluate", *overrides, environment=environment) as process:
        assert process.wait(RUN_TIMEOUT_S) == 1, process.printed()
        process.assert_nothing_left()
        error = process.stderr.splitlines()[-1]
        assert error.startswith("error: ")
        assert what in error
        assert f"reward ({name}){why}" in error
        assert "Traceback" not in process.printed()
        if scorer == "AlwaysRaises":
            assert f" rollouts, the last one because reward ({name}){why}" in process.stdout
