"""Finished trajectories as rows of the trajectory schema."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from actors.engine.interface import FinishedRollout, SamplingSettings, rollouts_to_batch
from buffer.trajectory.schema import TokenContract, trajectory_schema

CONTRACT = TokenContract(vocab_size=256, backspace_id=3, eos_id=2, tokenizer_hash="abc")
SAMPLING = SamplingSettings(max_new_tokens=8, max_actions=16, temperature=0.5, top_p=0.75, backspace=False)


def _log(name: str, prompt: list[int], actions: list[int], reason: str = "eos") -> FinishedRollout:
    return FinishedRollout(
        request_id=name,
        prompt_ids=np.array(prompt, dtype=np.int32),
        actions=np.array(actions, dtype=np.int32),
        logprobs=-np.arange(len(actions), dtype=np.float32),
        policy_version=np.full(len(actions), 7, dtype=np.int32),
        finish_reason=reason,  # type: ignore[arg-type]
    )


def test_rows_hold_the_logs() -> None:
    trajectories = [
        _log("a", [1, 5], [9, 3, 8, 2]),
        _log("b", [1], [], "aborted"),
        _log("c", [1, 4, 4], [6], "max_length"),
    ]
    batch = rollouts_to_batch(
        trajectories, CONTRACT, task="t", actor="actor-0", sampling=SAMPLING, weights_fingerprint="f"
    )
    assert batch.schema.equals(trajectory_schema(CONTRACT), check_metadata=True)
    rows = batch.to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["prompt_ids"] for row in rows] == [[1, 5], [1], [1, 4, 4]]
    assert [row["actions"] for row in rows] == [[9, 3, 8, 2], [], [6]]
    assert [row["logprobs"] for row in rows] == [[0, -1, -2, -3], [], [0]]
    assert [row["policy_version"] for row in rows] == [[7] * 4, [], [7]]
    assert [row["finish_reason"] for row in rows] == ["eos", "aborted", "max_length"]
    for row in rows:
        assert row["sampling"] == {"temperature": 0.5, "top_p": 0.75, "backspace": False}
        assert (row["source"], row["task"], row["actor"]) == ("policy", "t", "actor-0")
        assert row["weights_fingerprint"] == "f"
        assert row["executed"] is row["reward"] is row["features"] is None
        assert abs(row["created_at"] - datetime.now(UTC)) < timedelta(minutes=1)
    batch.validate(full=True)


def test_no_logs_make_an_empty_batch() -> None:
    batch = rollouts_to_batch([], CONTRACT, task="t", actor="a", sampling=SAMPLING, weights_fingerprint=None)
    assert batch.num_rows == 0
    assert batch.schema.field("actions").type == pa.list_(pa.int32())
