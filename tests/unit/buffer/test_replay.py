"""Replay of trajectories against a stack of events, on trajectories, batches and slices of every shape."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.trajectory.replay import FLOOR, TrajectoryArrays, final_token_ids, replay, surviving_events
from buffer.trajectory.schema import TokenContract, trajectory_schema
from tests.oracle import Log

BACKSPACE, EOS, VOCAB = 2, 1, 9
SCHEMA = trajectory_schema(TokenContract(VOCAB, BACKSPACE, EOS, "hash"))


def to_batch(trajectories: list[Log], *, spell_out: bool = False) -> pa.RecordBatch:
    """The full trajectory schema. `executed` is null where a trajectory has no noise, or all null elements
    (`spell_out`)."""

    def executed(trajectory: Log) -> list[int | None] | None:
        return (
            [trajectory.executed.get(t) for t in range(len(trajectory.actions))]
            if trajectory.executed or spell_out
            else None
        )

    rows = [
        {
            "id": str(i),
            "source": trajectory.source,
            "task": "t",
            "prompt_ids": trajectory.prompt,
            "actions": trajectory.actions,
            "executed": executed(trajectory),
            "finish_reason": trajectory.finish_reason,
            "actor": "a",
            "created_at": datetime.now(UTC),
        }
        for i, trajectory in enumerate(trajectories)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def check_against_a_stack(batch: pa.RecordBatch, trajectories: list[Log]) -> None:
    """Everything that replay says, from a Python list of the events that are left."""
    found = TrajectoryArrays.from_batch(batch)
    assert found.num_trajectories == len(trajectories)
    np.testing.assert_array_equal(found.lengths, [len(trajectory.actions) for trajectory in trajectories])
    np.testing.assert_array_equal(found.actions, [a for trajectory in trajectories for a in trajectory.actions])
    np.testing.assert_array_equal(
        found.prompt_ids, [token for trajectory in trajectories for token in trajectory.prompt]
    )
    np.testing.assert_array_equal(
        np.diff(found.prompt_offsets), [len(trajectory.prompt) for trajectory in trajectories]
    )

    expected: dict[str, list[int]] = {
        name: [] for name in ("trajectory", "time", "depth", "state", "next_state", "executed")
    }
    survivors: list[int] = []
    answers: list[list[int]] = []
    event = 0
    for i, trajectory in enumerate(trajectories):
        stack: list[tuple[int, int]] = []
        for t, action in enumerate(trajectory.actions):
            token = trajectory.executed.get(t, action)
            before = stack[-1][0] if stack else FLOOR
            if token == BACKSPACE:
                stack.pop()
            else:
                stack.append((event, token))
            after = stack[-1][0] if stack else FLOOR
            for name, value in zip(expected, (i, t, len(stack), before, after, token), strict=True):
                expected[name].append(value)
            event += 1
        survivors += [index for index, _ in stack]
        answers.append([token for _, token in stack])

    played = replay(found, BACKSPACE)
    for name in ("trajectory", "time", "depth", "state", "next_state"):
        np.testing.assert_array_equal(getattr(played, name), expected[name], err_msg=name)
        assert getattr(played, name).dtype == np.int64
    np.testing.assert_array_equal(found.executed, expected["executed"])
    survives = surviving_events(found, played, BACKSPACE)
    assert survives.dtype == np.bool_
    np.testing.assert_array_equal(np.flatnonzero(survives), survivors)
    offsets, ids = final_token_ids(found, played, BACKSPACE)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == answers
    assert len(offsets) == len(trajectories) + 1


HARD = [
    Log([4], []),
    Log([4, 5], [6, 7, BACKSPACE, BACKSPACE, 6, BACKSPACE, 7, EOS]),  # to the floor twice, and on
    Log([], [3, BACKSPACE]),  # empty prompt, empty answer
    Log([4], [6, 6, 6, BACKSPACE, 6, BACKSPACE, BACKSPACE, 6]),  # equal tokens at every depth
    Log([4], []),
    Log([5], [7, BACKSPACE, 7, EOS], executed={0: 8}),  # the label is not what was appended
    Log([5], [EOS, BACKSPACE, EOS], executed={0: 3}),  # noise before <eos>
    Log([5], [3, BACKSPACE, BACKSPACE], executed={1: 4}),  # a backspace that the environment overruled
    Log([5], []),
]


@pytest.mark.parametrize("spell_out", [False, True])
def test_hard_logs(spell_out):
    check_against_a_stack(to_batch(HARD, spell_out=spell_out), HARD)


def test_no_logs_and_only_empty_logs():
    check_against_a_stack(to_batch([]), [])
    check_against_a_stack(to_batch(HARD).slice(3, 0), [])
    check_against_a_stack(to_batch([HARD[0]] * 3, spell_out=True), [HARD[0]] * 3)


@st.composite
def random_trajectories(draw: st.SampleFn) -> list[Log]:
    tokens = st.integers(3, VOCAB - 1)
    moves = st.lists(st.tuples(st.booleans(), tokens, st.none() | tokens), max_size=14)
    trajectories = []
    for _ in range(draw(st.integers(0, 6))):
        depth, actions, executed = 0, [], {}
        for take_back, token, noise in draw(moves):
            if noise is not None:
                executed[len(actions)] = noise
            is_backspace = take_back and depth > 0
            actions.append(BACKSPACE if is_backspace else token)
            depth += -1 if is_backspace and noise is None else 1
        trajectories.append(Log(draw(st.lists(tokens, max_size=3)), actions, executed))
    return trajectories


@given(random_trajectories(), st.booleans(), st.data())
def test_random_logs_whole_and_sliced(trajectories, spell_out, data):
    batch = to_batch(trajectories, spell_out=spell_out)
    check_against_a_stack(batch, trajectories)
    begin = data.draw(st.integers(0, len(trajectories)), label="begin")
    end = data.draw(st.integers(begin, len(trajectories)), label="end")
    check_against_a_stack(batch.slice(begin, end - begin), trajectories[begin:end])


def test_values_under_a_null_list_are_not_read():
    """Arrow lets a null slot own values; they belong to nobody."""
    trajectories = [Log([4], [5, 6], executed={1: 7}), Log([4], [5, 6]), Log([4], [6, 5], executed={0: 8})]
    batch = to_batch(trajectories)
    executed = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 6], pa.int32()),
        pa.array([None, 7, 3, 3, 8, None], pa.int32()),
        mask=pa.array([False, True, False]),
    )
    hidden = batch.set_column(batch.schema.get_field_index("executed"), SCHEMA.field("executed"), executed)
    check_against_a_stack(hidden, trajectories)
    check_against_a_stack(hidden.slice(1), trajectories[1:])


def test_list_columns_are_viewed_not_copied():
    clean = to_batch([Log([4], [5, 6]), Log([4], [7])])
    values = clean.column("actions").values.to_numpy()
    trajectories = TrajectoryArrays.from_batch(clean)
    assert np.shares_memory(trajectories.actions, values)
    assert trajectories.executed is trajectories.actions
    assert np.shares_memory(trajectories.prompt_ids, clean.column("prompt_ids").values.to_numpy())
    noisy = TrajectoryArrays.from_batch(to_batch([Log([4], [5, 6], executed={0: 8})]))
    np.testing.assert_array_equal(noisy.actions, [5, 6])  # the labels stay as they were chosen
    np.testing.assert_array_equal(noisy.executed, [8, 6])


@pytest.mark.parametrize(
    ("trajectories", "culprit"),
    [
        ([Log([4], [BACKSPACE])], 0),
        ([Log([4], [5]), Log([4], []), Log([4], [5, BACKSPACE, BACKSPACE, 5, 5])], 2),  # back above it at the end
        ([Log([4], [5, 5]), Log([4], [BACKSPACE]), Log([4], [5])], 1),  # tokens of the trajectory before do not count
        ([Log([4], [5, BACKSPACE, BACKSPACE], executed={0: 6})], 0),
    ],
)
def test_a_backspace_at_the_floor_is_refused_by_name(trajectories, culprit):
    with pytest.raises(ValueError, match=rf"^trajectory {culprit} takes a token back at the floor"):
        replay(TrajectoryArrays.from_batch(to_batch(trajectories)), BACKSPACE)


def test_long_logs_stay_within_their_own_depths():
    """Depths of thousands, next to a trajectory that ends at the floor: nothing leaks from one trajectory to the
    next."""
    long = Log([4], [5] * 3000 + [BACKSPACE] * 2999 + [6] * 10)
    trajectories = [long, Log([4], [7, BACKSPACE]), long, Log([4], [8])]
    check_against_a_stack(to_batch(trajectories), trajectories)
