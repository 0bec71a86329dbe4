"""Into how many parts a model's layers can be divided; known from its config alone, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping

VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this."""


def check_division(size: int, config: Mapping[str, object]) -> None:
    """Refuse a number of ranks that vLLM cannot divide this model over.

    Args:
        size: number of ranks.
        config: the model's config.json; what it does not name is not checked.

    Raises:
        ValueError: says what cannot be divided, and which sizes can.
    """
    reason = _reason(size, config)
    if reason is not None:
        heads = _number(config, "num_attention_heads", "n_head") or 1
        possible = [str(other) for other in range(1, heads + 1) if _reason(other, config) is None]
        raise ValueError(
            f"actors.tensor_parallel_size={size} does not divide the model's {reason}: choose one of "
            f"{', '.join(possible)}"
        )


def _reason(size: int, config: Mapping[str, object]) -> str | None:
    heads = _number(config, "num_attention_heads", "n_head")
    if heads is not None and heads % size:
        return f"{heads} attention heads"
    shared = _number(config, "num_key_value_heads")
    if shared is not None and (shared % size if shared >= size else size % shared):  # fewer heads are on several ranks
        return f"{shared} heads of keys and values"
    inner = _number(config, "intermediate_size")
    if inner is not None and inner % size:
        return f"intermediate size of {inner}"
    vocab = _number(config, "vocab_size")
    if vocab is not None and (padded := -(-vocab // VOCAB_PADDING) * VOCAB_PADDING) % size:
        return f"vocabulary, {padded} ids with vLLM's padding"
    return None


def _number(config: Mapping[str, object], *names: str) -> int | None:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
