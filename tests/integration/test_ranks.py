"""Two and four ranks do what one does: the same gradients, metrics, weights and state, from processes of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.ranks import Ranks
from tests.integration.rank_worker import (
    CASES,
    RESUMED,
    STEPS,
    first_steps,
    more_steps,
    run_cases,
    run_ranks,
)
from tests.trajectories import BACKSPACE

SIZES = (2, 4)
# Times, and what depends on who evaluates which trajectory: ranks share no nodes.
PER_MACHINE = {"step_s", "data_wait_s", "actions_per_s", "unique_tokens_per_s", "sharing_ratio", "padding_fraction"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Result = dict[str, object]


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    """What one rank does, here."""
    return {name: first_steps(Ranks(), case, STEPS) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} ranks")
def folder(request: pytest.FixtureRequest, alone: dict[str, Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all cases with several ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(alone[RESUMED], folder / "alone.pt")
    assert run_ranks(request.param, run_cases, folder) == [0] * request.param
    return folder


def read(path: Path) -> Result:
    result: Result = torch.load(path, weights_only=True)
    return result


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """By the largest entry of all tensors: rounding scales with that."""
    assert found.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(
            found[name], tensor, rtol=0.0, atol=tolerance * scale, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_step_are_those_of_one_rank(folder, alone, name):
    found = read(folder / f"{name}.pt")["gradients"]
    assert_close(found, alone[name]["gradients"], CASES[name].tolerance)
    assert any(tensor.abs().max() > 0 for tensor in found.values())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_priorities])
def test_priorities_are_of_the_whole_draw_in_its_order(folder, alone, name):
    found, expected = read(folder / f"{name}.pt")["priorities"], alone[name]["priorities"]
    assert len(found) == STEPS
    assert_close(found, expected, max(1e-4, CASES[name].tolerance))
    assert all(len(priorities) == CASES[name].rollouts and priorities.min() > 0 for priorities in found.values())


@pytest.mark.parametrize("name", ["adapters", "llama, tied", "llama, untied, clipped", "gpt2"])
def test_every_rank_fits_the_same_backspace_row(folder, alone, name):
    found, before = (read(folder / f"{name}.pt")[state] for state in ("fitted", "weights"))
    assert_close(found, alone[name]["fitted"], 1e-5)
    (changed,) = (key for key in found if not torch.equal(found[key], before[key]))
    rows = (found[changed] != before[changed]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [BACKSPACE]


@pytest.mark.parametrize("name", ["adapters", "llama, tied", "gpt2"])
def test_every_rank_is_shown_the_mistakes_that_rank_0_draws(folder, alone, name):
    shown = alone[name]["shown"]
    assert BACKSPACE in shown
    assert torch.equal(read(folder / f"{name}.pt")["shown"], shown)


@pytest.mark.parametrize("name", ["adapters", "llama, tied", "bfloat16"])
def test_tensors_that_travel_apart_arrive_as_the_ranks_would_have_merged_them(folder, name):
    found = read(folder / f"{name}.pt")
    assert found["taken"].keys() == found["weights"].keys()
    for key, weight in found["weights"].items():
        assert torch.equal(found["taken"][key], weight), key


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_of_the_whole_batch(folder, alone, name):
    tolerance = max(1e-4, CASES[name].tolerance)
    for found, expected in zip(read(folder / f"{name}.pt")["metrics"], alone[name]["metrics"], strict=True):
        assert found.keys() == expected.keys()
        for metric in found.keys() - PER_MACHINE:
            assert found[metric] == pytest.approx(expected[metric], rel=tolerance, abs=tolerance / 10), metric


@pytest.mark.parametrize("name", CASES)
def test_weights_and_optimizer_after_a_few_steps(folder, alone, name):
    found, expected, tolerance = read(folder / f"{name}.pt"), alone[name], CASES[name].tolerance
    assert_close(found["weights"], expected["weights"], tolerance)
    torch.testing.assert_close(found["probe"], expected["probe"], rtol=0.0, atol=max(1e-4, 5 * tolerance))
    state, other = found["state"]["optimizer"], expected["state"]["optimizer"]
    assert state["param_groups"] == other["param_groups"]
    for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):  # a square has twice the relative error
        assert_close(
            *({i: values[moment] for i, values in each["state"].items()} for each in (state, other)), power * tolerance
        )
    assert found["state"]["learning_rate"] == expected["state"]["learning_rate"]
    remembered, others = found["state"]["objective"], expected["state"]["objective"]
    assert remembered.keys() == others.keys()
    for key, tensor in others.items():
        largest = max([1.0, *tensor.abs().flatten().tolist()])
        torch.testing.assert_close(remembered[key], tensor, rtol=0.0, atol=tolerance * largest)


def test_several_ranks_go_on_where_one_stopped(folder):
    expected = more_steps(Ranks(), CASES[RESUMED], read(folder / "alone.pt"), STEPS)
    found = read(folder / "resumed.pt")
    assert found["state"]["step"] == 2 * STEPS
    assert_close(found["weights"], expected["weights"], tolerance=1e-5)


def test_one_rank_goes_on_where_several_stopped(folder):
    expected = more_steps(Ranks(), CASES[RESUMED], read(folder / "alone.pt"), STEPS)
    found = more_steps(Ranks(), CASES[RESUMED], read(folder / f"{RESUMED}.pt"), STEPS)
    assert_close(found["weights"], expected["weights"], tolerance=1e-5)
