"""The state tree: every text once, every state where replay says it is, logits as if each text were alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from learner.state_tree import TreeBatch, build_tree_batch
from tests.oracle import Log, states, to_batch

BACKSPACE, EOS, VOCAB = 3, 2, 11


def build(logs: list[Log], max_nodes_per_row: int = 64, max_positions: int = 64) -> TreeBatch:
    return build_tree_batch(
        to_batch(logs),
        backspace_id=BACKSPACE,
        eos_id=EOS,
        max_nodes_per_row=max_nodes_per_row,
        max_positions=max_positions,
    )


def text_of(tree: TreeBatch, node: int) -> list[int]:
    """Read a node's text from its mask row: the tokens it sees, by position."""
    row, column = divmod(node, tree.node_ids.shape[1])
    seen = tree.attention_mask[row, 0, column].nonzero().flatten()
    by_position = seen[tree.positions[row, seen].argsort()]
    assert tree.positions[row, by_position].tolist() == list(range(len(seen)))
    assert by_position[-1] == column
    return tree.node_ids[row, by_position].tolist()


def check_against_replay(tree: TreeBatch, logs: list[Log]) -> None:
    flat = 0
    for i, log in enumerate(logs):
        texts = states(log, BACKSPACE)
        assert text_of(tree, int(tree.start[i])) == log.prompt
        assert text_of(tree, int(tree.final_state[i])) == texts[-1]
        assert bool(tree.final_at_floor[i]) == (texts[-1] == log.prompt)
        assert int(tree.length[i]) == len(log.actions)
        assert bool(tree.truncated[i]) == (log.finish_reason != "eos")
        assert bool(tree.is_expert[i]) == (log.source == "expert")
        for t, action in enumerate(log.actions):
            assert (int(tree.log[flat]), int(tree.time[flat]), int(tree.action[flat])) == (i, t, action)
            assert text_of(tree, int(tree.state[flat])) == texts[t]
            assert text_of(tree, int(tree.next_state[flat])) == texts[t + 1]
            assert bool(tree.at_floor[flat]) == (len(texts[t]) == len(log.prompt))
            assert bool(tree.next_at_floor[flat]) == (len(texts[t + 1]) == len(log.prompt))
            flat += 1
    assert flat == tree.num_actions
    for name in ("state", "next_state", "start"):
        assert torch.equal(tree.value_nodes[getattr(tree, f"{name}_row")], getattr(tree, name))
    assert torch.equal(tree.value_nodes[tree.final_row], tree.final_state)


HARD = [
    Log([1, 4], [5, 6, EOS]),
    Log([1, 4], [5, 7, BACKSPACE, 6, EOS]),
    Log([1, 4], [5, BACKSPACE, 5, BACKSPACE, 6], finish_reason="max_actions", source="policy"),
    Log([1, 4, 5], [6, EOS]),  # its prompt is another log's prompt and answer
    Log([1, 4, 5], [6, BACKSPACE, 6, EOS], realised={0: 7}),  # noise: the label 6 stays, 7 is appended
    Log([9], [8, BACKSPACE], finish_reason="aborted", source="policy"),  # ends at the floor
    Log([9], [], finish_reason="aborted", source="policy"),
    Log([1], [EOS]),
]


@pytest.mark.parametrize("max_nodes_per_row", [1, 6, 9, 64])
def test_states_are_those_of_replay(max_nodes_per_row):
    tree = build(HARD, max_nodes_per_row)
    check_against_replay(tree, HARD)
    rows = tree.start // tree.node_ids.shape[1]
    assert len(rows.unique()) == {1: 8, 6: 5, 9: 2, 64: 1}[max_nodes_per_row]  # counted by hand


def test_every_text_is_one_node():
    tree = build(HARD)
    prefixes = {tuple(text[:d]) for log in HARD for text in states(log, BACKSPACE) for d in range(1, len(text) + 1)}
    assert tree.num_nodes == len(prefixes)
    per_log = [{tuple(t[:d]) for t in states(log, BACKSPACE) for d in range(1, len(t) + 1)} for log in HARD]
    assert tree.num_nodes_unshared == sum(map(len, per_log))
    assert tree.num_nodes < tree.num_nodes_unshared
    sees_more = tree.attention_mask[:, 0].sum(-1) > 1
    roots = tree.num_nodes - int(sees_more.sum())
    assert roots == 2  # prompts begin with 1 and with 9: one node each


def packed_like(shared: bool, max_nodes_per_row: int) -> tuple[int, int]:
    """Shape (B, N) of 32 logs of 24 nodes, which share their first 20 or nothing."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(4, VOCAB, 20).tolist()
    logs = [
        Log(prompt if shared else rng.integers(4, VOCAB, 20).tolist(), [*rng.integers(4, VOCAB, 3).tolist(), EOS])
        for _ in range(32)
    ]
    tree = build(logs, max_nodes_per_row)
    check_against_replay(tree, logs)
    return tuple(tree.node_ids.shape)


def test_rows_are_as_wide_as_pays():
    """Shared prompts make wide rows worth their attention, unrelated ones do not."""
    rows, width = packed_like(shared=True, max_nodes_per_row=512)
    assert rows * width < 200
    rows, width = packed_like(shared=False, max_nodes_per_row=512)
    assert width <= 64
    assert packed_like(shared=True, max_nodes_per_row=24) == (32, 24)


@st.composite
def random_logs(draw: st.DrawFn) -> list[Log]:
    logs = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.sampled_from([1, 4, 5]), min_size=1, max_size=4))
        actions: list[int] = []
        realised: dict[int, int] = {}
        depth = 0
        for choice in draw(st.lists(st.integers(0, 6), max_size=12)):
            if choice <= 2 and depth:
                actions.append(BACKSPACE)
                depth -= 1
                continue
            if choice == 6:
                realised[len(actions)] = 5
            actions.append(4 + choice % 2)
            depth += 1
        ended = draw(st.booleans())
        logs.append(Log(prompt, actions + [EOS] * ended, realised, "eos" if ended else "max_actions"))
    return logs


@settings(max_examples=150, deadline=None)
@given(logs=random_logs(), max_nodes_per_row=st.integers(1, 40))
def test_random_logs(logs, max_nodes_per_row):
    tree = build(logs, max_nodes_per_row)
    check_against_replay(tree, logs)
    width = tree.node_ids.shape[1]
    rows_of_logs = (tree.start // width).tolist()
    for row in set(rows_of_logs):
        members = [log for log, r in zip(logs, rows_of_logs, strict=True) if r == row]
        texts = {tuple(t[:d]) for log in members for t in states(log, BACKSPACE) for d in range(1, len(t) + 1)}
        assert len(texts) <= max_nodes_per_row or len(members) == 1
        nodes = {tuple(text_of(tree, row * width + column)) for column in range(len(texts))}
        assert nodes == texts
        padding = tree.attention_mask[row, 0, len(texts) :]
        assert torch.equal(padding, torch.eye(width, dtype=torch.bool)[len(texts) :])


def test_a_slice_of_a_batch_is_like_its_copy():
    batch = to_batch(HARD)
    arguments = {"backspace_id": BACKSPACE, "eos_id": EOS, "max_nodes_per_row": 9, "max_positions": 64}
    sliced = build_tree_batch(batch.slice(2, 5), **arguments)
    copied = build_tree_batch(to_batch(HARD[2:7]), **arguments)
    for field in dataclasses.fields(sliced):
        assert np.array_equal(getattr(sliced, field.name), getattr(copied, field.name)), field.name


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ([], "without trajectories"),
        ([Log([1], [EOS]), Log([], [EOS])], "log 1 has an empty prompt"),
        ([Log([1], [BACKSPACE, EOS])], "at the floor"),
        ([Log([1], [BACKSPACE, EOS], realised={0: 5})], "backspace label at the floor"),
        ([Log([1], [EOS, 5], finish_reason="max_actions")], "<eos> must be the last"),
        ([Log([1], [5, EOS], finish_reason="max_actions")], "<eos> must be the last"),
        ([Log([1], [5], finish_reason="eos")], "<eos> must be the last"),
        ([Log([1] * 60, [5, 5, 5, 5, EOS])], "65 tokens, more than the 64"),
        ([Log([1] * 65, [], finish_reason="aborted")], "65 tokens, more than the 64"),
    ],
)
def test_refusals(logs, message):
    with pytest.raises(ValueError, match=message):
        build(logs)


def tiny(kind: str, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ).eval()


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("max_nodes_per_row", [1, 9, 64])
@torch.no_grad()
def test_logits_are_those_of_each_text_alone(kind, tied, max_nodes_per_row):
    model = tiny(kind, tied)
    tree = build(HARD, max_nodes_per_row)
    logits = model(
        input_ids=tree.node_ids, attention_mask=tree.attention_mask, position_ids=tree.positions, use_cache=False
    ).logits.flatten(0, 1)
    for node in tree.value_nodes.tolist():
        alone = model(input_ids=torch.tensor([text_of(tree, node)]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[node], alone, rtol=0, atol=1e-5)
