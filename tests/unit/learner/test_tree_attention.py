"""Attention over a state tree: hidden states and gradients as if each text were run alone, however it is computed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from learner.state_tree import attention as tree_attention
from learner.state_tree.attention import TILE_SIZES, block_mask, evaluate_nodes, tile_tree
from tests.oracle import Log
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, HARD, SIZES, VOCAB, TreeBatch, build, text_of, tiny

KINDS = ("llama", "qwen2", "qwen3", "gpt2")


def grown_trajectories(num_prompts: int = 3, rollouts: int = 7, length: int = 20) -> list[Log]:
    """Groups of rollouts, some of which take tokens back."""
    generator = np.random.default_rng(0)
    trajectories = []
    for _ in range(num_prompts):
        prompt = generator.integers(4, VOCAB, length).tolist()
        for i in range(rollouts):
            answer = generator.integers(4, VOCAB, length).tolist()
            if i % 2:
                answer[length // 2 : length // 2] = [4, 5, BACKSPACE, BACKSPACE]
            trajectories.append(Log(prompt, [*answer, EOS]))
    return trajectories


def alone(model, tree: TreeBatch, node: int) -> torch.Tensor:
    return model.base_model(input_ids=torch.tensor([text_of(tree, node)]), use_cache=False).last_hidden_state[0, -1]


@pytest.fixture
def tile_size(monkeypatch, request):
    """Forces the size of the tiles, so that small trees have many of them."""
    monkeypatch.setattr(tree_attention, "tile_tree", lambda tree: tile_tree(tree, request.param))
    return request.param


@pytest.mark.parametrize("tile_size", [1, 3, 8, 64], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states_are_those_of_each_text_alone(kind, tile_size):
    model = tiny(kind)
    tree = build(HARD)
    hidden = evaluate_nodes(model, tree)
    assert model.config._attn_implementation == tree_attention.NAME  # not the dense mask
    assert hidden.shape == (tree.num_padded_nodes, 32)
    for node in tree.nodes.states.tolist():
        torch.testing.assert_close(hidden[node], alone(model, tree, node), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tile_size", [3, 16, 512], indirect=True)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_those_of_the_dense_mask(kind, tile_size):
    tree = build(grown_trajectories())
    weight = torch.randn(tree.num_padded_nodes, 32, generator=torch.Generator().manual_seed(1))
    weight[tree.num_nodes :] = 0
    tiled, dense = tiny(kind).double(), tiny(kind).double()
    (evaluate_nodes(tiled, tree) * weight).sum().backward()
    hidden = dense.base_model(
        input_ids=tree.nodes.token_ids[None],
        attention_mask=tree.attention_mask[None, None],
        position_ids=tree.nodes.positions[None],
        use_cache=False,
    ).last_hidden_state[0]
    (hidden * weight).sum().backward()
    for name, parameter in dense.base_model.named_parameters():
        found = tiled.base_model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_with_another_attention_gets_the_dense_mask(kind):
    tiled, eager = tiny(kind), tiny(kind)
    eager.set_attn_implementation("eager")
    tree = build(grown_trajectories())
    found = evaluate_nodes(eager, tree)[: tree.num_nodes]
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(found, evaluate_nodes(tiled, tree)[: tree.num_nodes], rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_a_tree_the_model_is_as_before():
    """Plain texts, padded ones, and generation with a cache."""
    before = tiny("llama")
    after = copy.deepcopy(before)
    evaluate_nodes(after, build(HARD))
    ids = torch.randint(4, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.ones(3, 9, dtype=torch.int64)
    padded[1, :4] = 0
    for arguments in ({}, {"attention_mask": padded}):
        torch.testing.assert_close(after(ids, **arguments).logits, before(ids, **arguments).logits, rtol=0, atol=1e-6)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}
    assert torch.equal(after.generate(ids, **options), before.generate(ids, **options))


def test_a_saved_model_does_not_ask_for_this_attention(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        evaluate_nodes(model, build(HARD))
    model.save_pretrained(tmp_path)
    assert tree_attention.NAME not in (tmp_path / "config.json").read_text()
    assert tree_attention.NAME not in model.config.to_json_string(use_diff=False)


def visible(tree: TreeBatch, tile_size: int | None) -> torch.Tensor:
    """The N x N mask put together from the tiles."""
    tiles = tile_tree(tree, tile_size)
    order = tiles.order if tiles.order is not None else torch.arange(tiles.num_tiles)
    keys = tiles.keys if tiles.keys is not None else torch.arange(tiles.num_tiles * tiles.tile_size)
    size = tiles.num_tiles * tiles.tile_size
    dense = torch.zeros(size, size, dtype=torch.int64)
    tile, key = 0, 0
    for mask in tiles.masks:
        assert mask.any(-1).all()  # a query without a key is not a number
        for one in mask[:, 0]:
            rows = int(order[tile]) * tiles.tile_size + torch.arange(tiles.tile_size)
            columns = keys[key : key + one.shape[1]]
            dense.index_put_((rows[:, None], columns), one.long(), accumulate=True)
            tile, key = tile + 1, key + one.shape[1]
    assert (tile, key) == (tiles.num_tiles, len(keys))
    return dense[: tree.num_padded_nodes, : tree.num_padded_nodes]


@pytest.mark.parametrize("tile_size", [None, 1, 5, 16, 32, 64])
@pytest.mark.parametrize(
    "trajectories", [HARD, grown_trajectories(), grown_trajectories(1, 1, 60)], ids=["hard", "groups", "chain"]
)
def test_tiles_cover_every_pair_once(trajectories, tile_size):
    tree = build(trajectories, max_positions=200)
    assert torch.equal(visible(tree, tile_size), tree.attention_mask.long())


def test_the_keys_of_a_tile_do_not_grow_with_the_batch():
    few, many = build(grown_trajectories(2, 8)), build(grown_trajectories(40, 8))
    widest = [max(mask.shape[-1] for mask in tile_tree(tree).masks) for tree in (few, many)]
    assert many.num_nodes > 15 * few.num_nodes
    assert widest[1] <= 41 + 20 + 2 * tile_tree(many).tile_size
    assert tile_tree(many).tile_size in TILE_SIZES


def test_chains_of_equal_length_are_not_gathered():
    """As wide as a tile, they are a batch of texts without padding."""
    generator = np.random.default_rng(0)
    trajectories = [Log([i], [*generator.integers(4, VOCAB, 126).tolist(), EOS]) for i in range(1000, 1032)]
    tree = build(trajectories, max_positions=128)
    tiles = tile_tree(tree, 128)
    assert (tiles.order, tiles.keys) == (None, None)
    assert [tuple(mask.shape) for mask in tiles.masks] == [(32, 1, 128, 128)]


@pytest.mark.parametrize("trajectories", [HARD, grown_trajectories()], ids=["hard", "groups"])
def test_the_block_mask_is_the_dense_mask(trajectories):
    tree = build(trajectories)
    blocks = block_mask(tree)
    size = tree.num_padded_nodes
    assert torch.equal(create_mask(blocks.mask_mod, 1, 1, size, size, device="cpu")[0, 0], tree.attention_mask)
    for row, seen in enumerate(blocks.to_dense()[0, 0]):
        queries = tree.attention_mask[row * 128 : (row + 1) * 128]
        assert [bool(part.any()) for part in queries.split(128, dim=1)] == seen.bool().tolist()


def test_blocks_of_other_trees_are_skipped():
    tree = build(grown_trajectories(num_prompts=8, rollouts=8))
    assert tree.num_padded_nodes > 1280
    assert block_mask(tree).sparsity() > 60  # per cent; a causal mask of that many blocks has about 45


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_over_the_block_mask():
    tree = build(grown_trajectories())
    size = tree.num_padded_nodes
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, size, 16, generator=generator)
    key, value = (torch.randn(1, 2, size, 16, generator=generator) for _ in range(2))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=tree.attention_mask, enable_gqa=True)
    found = flex_attention(query, key, value, block_mask=block_mask(tree), enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_model_that_does_not_hand_the_tree_on_is_noticed():
    module = torch.nn.Module()
    states = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="does not hand on"):
        tree_attention.tree_attention(module, states, states, states, torch.empty(1, 1, 1, 0, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    tree = build(grown_trajectories())
    expected = evaluate_nodes(model, tree)
    found = evaluate_nodes(model.to(dtype), tree)
    assert found.dtype == dtype
    error = (found.float() - expected)[: tree.num_nodes]
    assert error.square().mean().sqrt() < 0.05  # of logits with a standard deviation of 1
    assert error.abs().max() < 0.5
