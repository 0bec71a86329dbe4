"""Attention of transformers' models over a state tree, chosen by device, without a change to any model class.

A model that runs PyTorch's fused attention (`sdpa`) is switched to the attention function of this file. It gives
exactly `sdpa` unless it is told of a tree: then it runs dense kernels over tiles (`learner.state_tree.tiles`), or on a
GPU `flex_attention` with a block mask. A model with another attention gets the dense N x N mask, added to its scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.state_tree.batch import TreeBatch
from learner.state_tree.tiles import TreeTiles, tile_tree

NAME = "state_tree"
"""Under this name transformers finds the attention function."""


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
