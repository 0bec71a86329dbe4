"""Streams: reproducible however they are drawn, resumable anywhere, and rows that keep the wire contract."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.experts.ragged import Ragged
from buffer.experts.stream import ExpertStream, PromptStream
from buffer.experts.tasks import Task, load_task
from buffer.settings import ArithmeticTaskSettings, NoiseSettings
from buffer.trajectory.replay import TrajectoryArrays, final_token_ids, replay
from buffer.trajectory.schema import trajectory_schema

NUM_EXAMPLES = 30


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(ArithmeticTaskSettings(bases=(5, 10), train_questions=NUM_EXAMPLES, held_out_questions=5))


def stream(task: Task, seed: int = 0, **noise: object) -> ExpertStream:
    return task.expert_stream(NoiseSettings(**noise), task.contract(), seed)


def rows(batches: list[pa.RecordBatch]) -> list[dict[str, object]]:
    table = pa.Table.from_batches(batches).drop_columns(["created_at"])
    return table.to_pylist()


@given(st.lists(st.integers(0, 45), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_stream_does_not_depend_on_how_it_is_drawn_or_interrupted(task: Task, counts: list[int], stop: int) -> None:
    whole = rows([stream(task).sample(sum(counts))])
    first = stream(task)
    parts = [first.sample(count) for count in counts[:stop]]
    resumed = stream(task)
    resumed.load_state(json.loads(json.dumps(first.state())))
    parts += [resumed.sample(count) for count in counts[stop:]]
    assert rows(parts) == whole


def test_rows_keep_the_contract(task: Task) -> None:
    batch = stream(task, rate=0.5).sample(100)
    assert batch.schema.equals(trajectory_schema(task.contract()), check_metadata=True)
    batch.validate(full=True)
    assert len(set(batch.column("id").to_pylist())) == 100
    assert set(batch.column("source").to_pylist()) == {"expert"}
    assert set(batch.column("finish_reason").to_pylist()) == {"eos"}
    for name in ("logprobs", "policy_version", "weights_fingerprint", "sampling", "reward", "features"):
        assert batch.column(name).null_count == 100
    noisy = [row for row in batch.to_pylist() if row["executed"] is not None]
    assert 0 < len(noisy) < 100
    for row in noisy:
        assert len(row["executed"]) == len(row["actions"])
        assert not {task.eos_id, task.backspace_id} & set(row["executed"])


@pytest.mark.parametrize("kind", ["none", "random", "task"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
def test_every_epoch_holds_every_clean_answer_once(task: Task, kind: str, rate: float) -> None:
    expected = sorted(zip(task.train["prompt_ids"], task.train["target_ids"], strict=True))
    source = stream(task, kind=kind, rate=rate)
    orders = []
    for _ in range(2):
        batch = source.sample(NUM_EXAMPLES)
        trajectories = TrajectoryArrays.from_batch(batch)
        answers = Ragged(*final_token_ids(trajectories, replay(trajectories, task.backspace_id), task.backspace_id))
        drawn = list(zip(batch.column("prompt_ids").to_pylist(), answers.to_arrow().to_pylist(), strict=True))
        assert sorted(drawn) == expected
        orders.append(drawn)
        num_backspaces = int((trajectories.actions == task.backspace_id).sum())
        assert (num_backspaces > 0) == (rate > 0 and kind != "none")
    assert orders[0] != orders[1]


def test_rate_and_kind_of_the_injected_tokens(task: Task) -> None:
    rate, count = 0.4, 60 * NUM_EXAMPLES
    batch = stream(task, kind="task", rate=rate).sample(count)
    trajectories = TrajectoryArrays.from_batch(batch)
    is_five = np.array(["In base 5," in task.tokenizer.decode(ids) for ids in batch.column("prompt_ids").to_pylist()])
    base = np.repeat(np.where(is_five, 5, 10), trajectories.lengths)
    is_injected = trajectories.actions != trajectories.executed
    digits = np.array([int(digit) for digit in task.tokenizer.decode(trajectories.executed[is_injected])])
    assert set(digits[base[is_injected] == 5].tolist()) == set(range(5))
    assert set(digits[base[is_injected] == 10].tolist()) == set(range(10))
    # Each position of the clean answers has one draw. Before a digit one draw in `base` is void; before <eos> and a
    # minus sign every digit is wrong.
    is_position = ~is_injected & (trajectories.actions != task.backspace_id)
    always_wrong = np.isin(trajectories.actions, [task.eos_id, task.tokenizer.convert_tokens_to_ids("-")])
    expected = rate * np.where(always_wrong, 1.0, 1 - 1 / base)[is_position].sum()
    assert abs(is_injected.sum() - expected) < 5 * np.sqrt(is_position.sum() * rate * (1 - rate))


def test_noise_is_fresh_every_epoch_and_differs_between_seeds(task: Task) -> None:
    def noise_of(batch: pa.RecordBatch) -> dict[tuple[int, ...], object]:
        return {tuple(row["prompt_ids"]): row["executed"] for row in batch.to_pylist()}

    source = stream(task, rate=0.5)
    first, second = noise_of(source.sample(NUM_EXAMPLES)), noise_of(source.sample(NUM_EXAMPLES))
    other = noise_of(stream(task, seed=1, rate=0.5).sample(NUM_EXAMPLES))
    assert first.keys() == second.keys() == other.keys()
    assert first != second
    assert first != other


def test_policy_noise_is_planned_here_and_drawn_elsewhere(task: Task) -> None:
    source = ExpertStream(
        task.example_table(),
        task=task.name,
        noise=NoiseSettings(kind="policy", rate=0.5),
        contract=task.contract(),
        seed=3,
        actor="actor-7",
    )
    with pytest.raises(ValueError, match="the actors draw the tokens"):
        source.sample(4)
    plan = source.plan(20)
    prefixes = plan.prefixes()
    assert prefixes.num_rows == len(plan.positions) > 0
    for position, prefix in zip(plan.positions.tolist(), prefixes.rows(), strict=True):
        row = int(np.searchsorted(plan.targets.offsets, position, side="right")) - 1
        so_far = plan.targets.values[plan.targets.offsets[row] : position]
        assert prefix.tolist() == [*plan.prompts.rows()[row].tolist(), *so_far.tolist()]
    minus = task.tokenizer.convert_tokens_to_ids("-")
    batch = source.execute(plan, np.full(len(plan.positions), minus, dtype=np.int32))
    trajectories = TrajectoryArrays.from_batch(batch)
    injected = trajectories.executed != trajectories.actions
    assert set(trajectories.executed[injected].tolist()) == {minus}
    assert injected.sum() == (plan.targets.values[plan.positions] != minus).sum()
    assert batch.column("id")[0].as_py() == "actor-7/arithmetic/3/0"
    assert batch.column("actor")[0].as_py() == "actor-7"


def test_candidates_go_with_the_kind(task: Task) -> None:
    contract, candidates = task.contract(), task.random_noise
    for kind, of_kind in (("task", None), ("random", None), ("none", candidates), ("policy", candidates)):
        noise = NoiseSettings(kind=kind)
        with pytest.raises(ValueError, match="candidates"):
            ExpertStream(task.train, task="t", noise=noise, contract=contract, seed=0, candidates=of_kind)


def test_states_of_other_streams_are_refused(task: Task) -> None:
    source = stream(task)
    for state in ({"rows": 1}, {**source.state(), "examples": 31}):
        with pytest.raises(ValueError, match="is not one of a stream over 30 examples; resume with the task settings"):
            source.load_state(state)


def test_contract_of_other_tokens_is_refused(task: Task) -> None:
    task.expert_stream(NoiseSettings(), task.contract(vocab_size=64), seed=0)
    other = dataclasses.replace(task.contract(), tokenizer_hash="0")
    with pytest.raises(ValueError, match="is not that of the task's tokenizer"):
        task.expert_stream(NoiseSettings(), other, seed=0)


@given(st.lists(st.integers(0, 45), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_prompts_are_seeded_and_cover_every_epoch(task: Task, counts: list[int]) -> None:
    source = PromptStream(task.train, seed=5)
    drawn = [source.sample(count) for count in counts]
    assert [batch.num_rows for batch in drawn] == counts
    prompts = [prompt.tolist() for batch in drawn for prompt in batch.rows()]
    for start in range(0, len(prompts) - NUM_EXAMPLES + 1, NUM_EXAMPLES):
        assert sorted(prompts[start : start + NUM_EXAMPLES]) == sorted(task.train["prompt_ids"])
    whole, other = (PromptStream(task.example_table(), seed).sample(sum(counts) + 40) for seed in (5, 6))
    assert [prompt.tolist() for prompt in whole.rows()][: len(prompts)] == prompts
    assert whole.values.tolist() != other.values.tolist()


def test_a_task_passes_between_processes(task: Task) -> None:
    received = pickle.loads(pickle.dumps(task))
    assert received.contract() == task.contract()
    original, copy = (t.expert_stream(NoiseSettings(), t.contract(), seed=0) for t in (task, received))
    assert rows([copy.sample(50)]) == rows([original.sample(50)])
    assert received.is_correct("12", {"answer": "12"})


def test_streams_import_no_engine() -> None:
    code = (
        "import sys, buffer.experts.tasks, launch.evaluation.rollout_metrics, launch.rollout_view;"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_no_examples_is_an_error(task: Task) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        PromptStream(task.example_table().slice(0, 0), seed=0)
