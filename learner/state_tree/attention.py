"""Attention of transformers' models over a state tree, chosen by device, without a change to any model class.

A model that runs PyTorch's fused attention (`sdpa`) is switched to the attention function of this file. It gives
exactly `sdpa` unless it gets a tree: then it runs dense kernels over tiles, or on a GPU `flex_attention` with a
block mask. A model with another attention gets the dense N x N mask, added to its scores.

A tile is T queries in preorder. A node that a query of the tile sees lies in the tile, or else is an ancestor of the
tile's *first* node: its subtree holds a later node of the tile, so it holds the first one too. So a tile needs its own
T keys and those on one path to a root, at most the length of the longest text, however many nodes the batch has. Tiles
with paths of like length are done together.

Legend: N nodes, T queries per tile, G tiles of a group, K keys of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.state_tree.batch import TreeBatch

NAME = "state_tree"
"""Under this name transformers finds the attention function."""

TILE_SIZES = (16, 32, 64, 128, 256, 512)

GROUPS = 4
"""At most about this many groups with paths of different lengths, plus one of tiles without a path."""

GATHER_COST = 32
"""Bringing a key (and its value) to a tile, forward and backward, costs about as much as this many queries on it.
Measured with 8 heads of 32 numbers on a CPU; the optimum is flat."""

GROUP_COST = 2**15
"""Overhead of a group, in pairs of a query and a key."""


def evaluate_nodes(model: PreTrainedModel, tree: TreeBatch) -> Tensor:
    """[N, H] last hidden state of every node, as if its text were run alone. ValueError: the model's layers do not hand
    on what their attention is told."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME:
        # A 4-dimensional mask is handed on as it is, and spares the model the making of one; nobody reads this one.
        mask = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=tree.nodes.token_ids.device)
        structure = block_mask(tree) if mask.is_cuda else tile_tree(tree)
        attention = {"attention_mask": mask, "state_tree": structure}
    else:
        unseen = torch.finfo(model.dtype).min
        mask = torch.zeros(tree.attention_mask.shape, dtype=model.dtype, device=tree.nodes.token_ids.device)
        attention = {"attention_mask": mask.masked_fill_(~tree.attention_mask, unseen)[None, None]}
    outputs = model.base_model(
        input_ids=tree.nodes.token_ids[None], position_ids=tree.nodes.positions[None], use_cache=False, **attention
    )
    hidden: Tensor = outputs.last_hidden_state[0]
    return hidden


def block_mask(tree: TreeBatch) -> BlockMask:
    """What `flex_attention` needs to skip blocks of nodes that do not see each other."""
    subtree_end = tree.nodes.subtree_end

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[key])

    size = tree.num_padded_nodes
    return create_block_mask(sees, B=None, H=None, Q_LEN=size, KV_LEN=size, device=str(subtree_end.device))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    state_tree: TreeTiles | BlockMask | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: `sdpa`, unless `state_tree` says who sees whom.

    query: [1, heads, N, D]. key, value: [1, key-value heads, N, D]. Gives [1, N, heads, D], and no attention weights.
    """
    # Under autocast rotary embeddings in float32 have widened them; values come straight from a product.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if state_tree is None:
        if attention_mask is not None and not attention_mask.numel():
            raise ValueError(
                "this model is not supported: it does not hand on what its attention is told of the state tree; "
                "choose another one"
            )
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if isinstance(state_tree, BlockMask):
        output, _ = flex_attention_forward(module, query, key, value, state_tree, scaling=scaling)
        return output, None
    return _tiled_attention(query, key, value, state_tree, dropout, scaling), None


@dataclass(frozen=True)
class TreeTiles:
    """All tiles of a batch, in groups of G tiles that are done in one kernel call.

    tile_size: T. num_tiles: N / T rounded up.
    order: [num_tiles] tile at each place, group by group; None where each tile stands at its own place.
    place: [num_tiles] place of each tile, likewise.
    keys: [sum of G * K] node of each key, tile by tile; None where every tile has its own nodes and no other.
    masks: [G, 1, T, K] of each group, True where the query sees the key. Every query, padding too, sees at least one.
    """

    tile_size: int
    num_tiles: int
    order: Tensor | None
    place: Tensor | None
    keys: Tensor | None
    masks: tuple[Tensor, ...]


def tile_tree(tree: TreeBatch, tile_size: int | None = None) -> TreeTiles:
    """Tiles of a batch, on its device. tile_size: T; by default the cheapest of `TILE_SIZES`."""
    depth = tree.nodes.positions.cpu()
    if tile_size is None:
        tile_size = min(TILE_SIZES, key=lambda size: _cost(depth[::size], size))
    path_lengths = _rounded(depth[::tile_size], tile_size)
    order = torch.argsort(path_lengths, stable=True)
    device = tree.nodes.token_ids.device
    lengths, counts = path_lengths.unique(return_counts=True)
    keys, masks = [], []
    for length, tiles in zip(lengths.tolist(), order.to(device).split(counts.tolist()), strict=True):
        group_keys, mask = _keys_and_mask(tree, tiles, length, tile_size)
        keys.append(group_keys.flatten())
        masks.append(mask)
    in_place = len(masks) == 1
    return TreeTiles(
        tile_size=tile_size,
        num_tiles=len(path_lengths),
        order=None if in_place else order.to(device),
        place=None if in_place else torch.argsort(order).to(device),
        keys=None if in_place and not lengths.any() else torch.cat(keys),
        masks=tuple(masks),
    )


def _rounded(path_lengths: Tensor, tile_size: int) -> Tensor:
    """[tiles] path lengths, rounded up so that few are different."""
    step = max(tile_size, -(-int(path_lengths.max()) // GROUPS))
    return (path_lengths + step - 1) // step * step


def _cost(path_lengths: Tensor, tile_size: int) -> float:
    """Time of one attention layer, in pairs of a query and a key."""
    rounded = _rounded(path_lengths, tile_size)
    num_keys = rounded + tile_size
    gather_cost = GATHER_COST if rounded.any() else 0
    return float((num_keys * (tile_size + gather_cost)).sum()) + len(rounded.unique()) * GROUP_COST


def _keys_and_mask(tree: TreeBatch, tiles: Tensor, path_length: int, tile_size: int) -> tuple[Tensor, Tensor]:
    """[G, K] node of each key (any, where there is none) and [G, 1, T, K] mask of some tiles."""
    device = tiles.device
    queries = tiles[:, None] * tile_size + torch.arange(tile_size, device=device)  # [G, T], some beyond N
    keys = queries
    if path_length:
        # The path of the tile's first node: what comes before it and whose subtree reaches it.
        node = torch.arange(tree.num_padded_nodes, device=device)
        first = queries[:, :1]
        tile, ancestor = torch.nonzero((node < first) & (tree.nodes.subtree_end > first), as_tuple=True)
        path = torch.full((len(tiles), path_length), tree.num_padded_nodes, device=device)
        path[tile, tree.nodes.positions[ancestor]] = ancestor
        keys = torch.cat([path, queries], dim=1)
    inside = keys < tree.num_padded_nodes
    keys = torch.where(inside, keys, 0)
    end = torch.where(inside, tree.nodes.subtree_end[keys], 0)
    mask = (keys[:, None] <= queries[..., None]) & (end[:, None] > queries[..., None])
    mask |= (queries >= tree.num_padded_nodes)[..., None]  # a row without any key would be not a number
    return keys, mask[:, None]


def _tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: TreeTiles, dropout: float, scaling: float | None
) -> Tensor:
    """As `tree_attention`. Tensors are cut and gathered node by node, so that whole rows are copied."""
    num_nodes = query.shape[2]
    num_tiles, tile_size = tiles.num_tiles, tiles.tile_size

    def cut(heads: Tensor) -> Tensor:
        """[1, heads, N, D] -> [tiles * T, heads, D]"""
        return pad(heads[0].transpose(0, 1), (0, 0, 0, 0, 0, num_tiles * tile_size - num_nodes))

    def gather(heads: Tensor) -> Tensor:
        """[1, heads, N, D] -> [keys of all tiles, heads, D]"""
        return cut(heads) if tiles.keys is None else heads[0].transpose(0, 1).index_select(0, tiles.keys)

    queries = cut(query).unflatten(0, (num_tiles, tile_size))
    if tiles.order is not None:
        queries = queries.index_select(0, tiles.order)
    sizes = [(len(mask), mask.shape[-1]) for mask in tiles.masks]
    num_keys = [count * keys for count, keys in sizes]
    groups = zip(
        sizes,
        tiles.masks,
        queries.split([count for count, _ in sizes]),
        gather(key).split(num_keys),
        gather(value).split(num_keys),
        strict=True,
    )
    outputs = [
        scaled_dot_product_attention(
            group_queries.transpose(1, 2),
            group_keys.unflatten(0, size).transpose(1, 2),
            group_values.unflatten(0, size).transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        for size, mask, group_queries, group_keys, group_values in groups
    ]
    output = outputs[0] if tiles.place is None else torch.cat(outputs).index_select(0, tiles.place)
    return output.flatten(0, 1)[None, :num_nodes]


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
