"""Which keys the nodes of a state tree attend to, cut into tiles that dense attention kernels take.

Queries are cut into tiles of T nodes in preorder. A node that a query of the tile sees lies in the tile, or else is an
ancestor of the tile's *first* node: its subtree holds a later node of the tile, so it holds the first one too. So a
tile needs its own T keys and those on one path to a root, at most the length of the longest text, however many nodes
the batch has. Tiles with paths of like length are done together.

Legend: N nodes, T queries per tile, G tiles of a group, K keys of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.state_tree.batch import TreeBatch

TILE_SIZES = (16, 32, 64, 128, 256, 512)

GROUPS = 4
"""At most about this many groups with paths of different lengths, plus one of tiles without a path."""

GATHER_COST = 32
"""Bringing a key (and its value) to a tile, forward and backward, costs about as much as this many queries on it.
Measured with 8 heads of 32 numbers on a CPU; the optimum is flat."""

GROUP_COST = 2**15
"""Overhead of a group, in pairs of a query and a key."""


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
