"""The state tree: every text once, every state where replay says it is, every subtree one interval of nodes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner.state_tree.batch import NODE_ALIGNMENT, TreeBatch, TreeSettings, build_tree_batch
from tests.oracle import Log, states, to_batch

BACKSPACE, EOS, VOCAB = 3, 2, 11


def build(trajectories: list[Log], max_positions: int = 64, **settings) -> TreeBatch:
    return build_tree_batch(to_batch(trajectories), TreeSettings(BACKSPACE, EOS, 10_000, max_positions, **settings))


def text_of(tree: TreeBatch, node: int) -> list[int]:
    """Read a node's text from the tokens it sees."""
    seen = (tree.nodes.subtree_end[: node + 1] > node).nonzero().flatten()
    assert tree.nodes.positions[seen].tolist() == list(range(len(seen)))  # an ancestor comes before its descendants
    assert seen[-1] == node
    return tree.nodes.token_ids[seen].tolist()


def check_against_replay(tree: TreeBatch, trajectories: list[Log]) -> None:
    flat = 0
    for i, trajectory in enumerate(trajectories):
        texts = states(trajectory, BACKSPACE)
        assert text_of(tree, int(tree.nodes.states[tree.trajectories.start[i]])) == trajectory.prompt
        assert text_of(tree, int(tree.nodes.states[tree.trajectories.final[i]])) == texts[-1]
        masked = [len(text) == len(trajectory.prompt) or not trajectory.offers_backspace for text in texts]
        assert bool(tree.trajectories.final_backspace_masked[i]) == masked[-1]
        assert int(tree.trajectories.length[i]) == len(trajectory.actions)
        assert bool(tree.trajectories.truncated[i]) == (trajectory.finish_reason != "eos")
        assert bool(tree.trajectories.is_expert[i]) == (trajectory.source == "expert")
        for t, action in enumerate(trajectory.actions):
            assert (
                int(tree.actions.trajectory[flat]),
                int(tree.actions.time[flat]),
                int(tree.actions.label[flat]),
            ) == (i, t, action)
            assert text_of(tree, int(tree.nodes.states[tree.actions.state[flat]])) == texts[t]
            assert text_of(tree, int(tree.nodes.states[tree.actions.next_state[flat]])) == texts[t + 1]
            assert bool(tree.actions.backspace_masked[flat]) == masked[t]
            assert bool(tree.actions.next_backspace_masked[flat]) == masked[t + 1]
            flat += 1
    assert flat == tree.num_actions
    assert torch.equal(tree.nodes.states, tree.nodes.states.unique())


HARD = [
    Log([1, 4], [5, 6, EOS]),
    Log([1, 4], [5, 7, BACKSPACE, 6, EOS]),
    Log([1, 4], [5, BACKSPACE, 5, BACKSPACE, 6], finish_reason="max_actions", source="policy"),
    Log([1, 4, 5], [6, EOS]),  # its prompt is another trajectory's prompt and answer
    Log([1, 4, 5], [6, BACKSPACE, 6, EOS], executed={0: 7}),  # noise: the label 6 stays, 7 is appended
    Log([9], [8, BACKSPACE], finish_reason="aborted", source="policy"),  # ends at the floor
    Log([9], [], finish_reason="aborted", source="policy"),
    Log([1], [EOS]),
]
NEVER_OFFERED = Log(
    [1, 4], [5, 6], finish_reason="max_length", source="policy", temperature=1.0, offers_backspace=False
)


def test_states_are_those_of_replay():
    trajectories = [*HARD, NEVER_OFFERED]
    check_against_replay(build(trajectories), trajectories)


def test_backspace_is_no_action_where_the_run_has_none():
    trajectories = [Log([1, 4], [5, 6, EOS]), NEVER_OFFERED]
    tree = build(trajectories, offers_backspace=False)
    for masked in (
        tree.actions.backspace_masked,
        tree.actions.next_backspace_masked,
        tree.trajectories.final_backspace_masked,
    ):
        assert masked.all()
    check_against_replay(tree, [dataclasses.replace(trajectory, offers_backspace=False) for trajectory in trajectories])


def test_every_text_is_one_node():
    tree = build(HARD)
    prefixes = {
        tuple(text[:d])
        for trajectory in HARD
        for text in states(trajectory, BACKSPACE)
        for d in range(1, len(text) + 1)
    }
    assert tree.num_nodes == len(prefixes)
    per_trajectory = [
        {tuple(t[:d]) for t in states(trajectory, BACKSPACE) for d in range(1, len(t) + 1)} for trajectory in HARD
    ]
    assert tree.num_nodes_unshared == sum(map(len, per_trajectory))
    assert tree.num_nodes < tree.num_nodes_unshared
    roots = tree.nodes.positions[: tree.num_nodes] == 0
    assert int(roots.sum()) == 2  # prompts begin with 1 and with 9: one node each


def check_preorder(tree: TreeBatch) -> None:
    """A subtree is one interval, and padding sees itself only."""
    end, positions = tree.nodes.subtree_end.tolist(), tree.nodes.positions.tolist()
    assert len(end) == tree.num_padded_nodes
    assert tree.num_padded_nodes % NODE_ALIGNMENT == 0
    assert tree.num_padded_nodes - tree.num_nodes < NODE_ALIGNMENT
    for node in range(tree.num_nodes):
        below = next((n for n in range(node + 1, tree.num_nodes) if positions[n] <= positions[node]), tree.num_nodes)
        assert end[node] == below
    assert end[tree.num_nodes :] == list(range(tree.num_nodes + 1, len(end) + 1))


def test_a_long_text_and_a_wide_tree():
    """Depth and number of siblings far beyond those of the random trajectories below."""
    long = Log([1], [4 + i % 7 for i in range(300)] + [EOS])
    wide = [Log([1, 4], [4 + i, EOS], finish_reason="eos") for i in range(200)]
    tree = build([long, *wide], max_positions=1000)
    check_preorder(tree)
    assert int(tree.nodes.positions.max()) == 301
    check_against_replay(tree, [long, *wide])


@st.composite
def random_trajectories(draw: st.SampleFn) -> list[Log]:
    trajectories = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.sampled_from([1, 4, 5]), min_size=1, max_size=4))
        actions: list[int] = []
        executed: dict[int, int] = {}
        depth = 0
        for choice in draw(st.lists(st.integers(0, 6), max_size=12)):
            if choice <= 2 and depth:
                actions.append(BACKSPACE)
                depth -= 1
                continue
            if choice == 6:
                executed[len(actions)] = 5
            actions.append(4 + choice % 2)
            depth += 1
        ended = draw(st.booleans())
        trajectories.append(Log(prompt, actions + [EOS] * ended, executed, "eos" if ended else "max_actions"))
    return trajectories


@settings(max_examples=150, deadline=None)
@given(trajectories=random_trajectories())
def test_random_logs(trajectories):
    tree = build(trajectories)
    check_against_replay(tree, trajectories)
    check_preorder(tree)
    texts = {
        tuple(text[:d])
        for trajectory in trajectories
        for text in states(trajectory, BACKSPACE)
        for d in range(1, len(text) + 1)
    }
    assert {tuple(text_of(tree, node)) for node in range(tree.num_nodes)} == texts
    assert tree.num_nodes == len(texts)


def test_each_eos_of_several_ends_a_log():
    trajectories = [Log([5], [7, EOS]), Log([5], [7, 9])]
    tree = build(trajectories, other_eos_ids=(9,))
    assert tree.trajectories.truncated.tolist() == [False, False]
    with pytest.raises(ValueError, match="trajectory 1 takes"):
        build(trajectories)


def test_a_slice_of_a_batch_is_like_its_copy():
    trajectories = [
        dataclasses.replace(trajectory, reward=float(n), features=[n, -1.0]) for n, trajectory in enumerate(HARD)
    ]
    sliced = build_tree_batch(to_batch(trajectories).slice(2, 5), TreeSettings(BACKSPACE, EOS, 10_000, 64))
    copied = build(trajectories[2:7])
    for part in ("nodes", "actions", "trajectories"):
        for name, values in vars(getattr(sliced, part)).items():
            assert np.array_equal(values, getattr(getattr(copied, part), name)), name
    assert sliced.trajectories.features[:, 0].tolist() == sliced.trajectories.reward.tolist() == [2, 3, 4, 5, 6]


def test_scores_and_contexts_of_logs():
    """A trajectory without a reward has none, features are all or none, and a context is a prompt."""
    tree = build([dataclasses.replace(trajectory, reward=None if n == 1 else 0.5) for n, trajectory in enumerate(HARD)])
    assert tree.trajectories.reward.isnan().tolist() == [n == 1 for n in range(len(HARD))]
    assert tree.trajectories.features.shape == (len(HARD), 0)
    prompts = [tuple(trajectory.prompt) for trajectory in HARD]
    contexts = tree.trajectories.context.tolist()
    assert [[a == b for b in contexts] for a in contexts] == [[a == b for b in prompts] for a in prompts]
    assert [int(float(context)) for context in contexts] == contexts
    with pytest.raises(ValueError, match="between 0 and 3 features"):
        build([HARD[0], dataclasses.replace(HARD[1], features=[1.0, 2.0, 3.0])])


@pytest.mark.parametrize(
    ("trajectories", "message"),
    [
        ([], "without trajectories"),
        ([Log([1], [EOS]), Log([], [EOS])], "trajectory 1 has an empty prompt"),
        ([Log([1], [BACKSPACE, EOS])], "at the floor"),
        ([Log([1], [BACKSPACE, EOS], executed={0: 5})], "at the floor"),
        ([Log([1], [EOS, 5], finish_reason="max_actions")], "finish_reason is `eos`"),
        ([Log([1], [5, EOS], finish_reason="max_actions")], "finish_reason is `eos`"),
        ([Log([1], [5], finish_reason="eos")], "finish_reason is `eos`"),
        ([Log([1] * 60, [5, 5, 5, 5, EOS])], "65 tokens, more than the 64"),
        ([Log([1] * 65, [], finish_reason="aborted")], "65 tokens, more than the 64"),
    ],
)
def test_refusals(trajectories, message):
    with pytest.raises(ValueError, match=message):
        build(trajectories)


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def tiny(kind: str, tied: bool = True) -> PreTrainedModel:
    """A random model of one of four architectures."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        return GPT2LMHeadModel(config).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
