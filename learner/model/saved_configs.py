"""The two configs that lie beside a model's weights: made to say what training does, and to be savable.

transformers stops generation at each `<eos>` of generation_config.json, and demonstrations end with the one of the
tokenizer, which may not be among them. transformers also loads configs that it refuses to save.
"""

from __future__ import annotations

import copy

import numpy as np
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from buffer.trajectory.schema import TokenContract


def align_eos(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, backspace_id: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Make config and generation config of `model` (in place) name the `<eos>` ids that end a text in training.

    The tokenizer's `<eos>` is the first. Where a config lists several, as those of chat models do, each of them ends a
    text; a single other one is of another tokenizer and goes. Gives the ids beside the tokenizer's, ascending, and a
    sentence for the user where a config named something else.
    """
    eos_id = int(tokenizer.eos_token_id)
    text_config, generation = model.config.get_text_config(), model.generation_config
    named = {"config.json": text_config.eos_token_id}
    if generation is not None:
        named["generation_config.json"] = generation.eos_token_id
    listed = {token_id for found in named.values() if isinstance(found, list) and len(found) > 1 for token_id in found}
    others = sorted(listed.intersection(tokenizer.get_vocab().values()) - {eos_id, backspace_id})
    ids = [eos_id, *others]
    model.config.eos_token_id = text_config.eos_token_id = ids if others else eos_id
    if generation is not None:
        generation.eos_token_id = ids if others else eos_id
    wrong = {file: found for file, found in named.items() if not _names_some_of(found, ids)}
    if not wrong:
        return tuple(others), ()
    tokens = ", ".join(f"{tokenizer.convert_ids_to_tokens(token_id)} (id {token_id})" for token_id in ids)
    words = " and ".join(f"{found} in {file}" for file, found in wrong.items())
    note = f"a text ends with {tokens} alone, in training as in checkpoints and exports; the model came with {words}"
    return tuple(others), (note,)


def _names_some_of(found: object, ids: list[int]) -> bool:
    """Whether a config's `<eos>` is the first of `ids`, or a list with it and no other ids than these."""
    named = found if isinstance(found, list) else [found]
    return ids[0] in named and set(named) <= set(ids)


def mend_configs(model: PreTrainedModel, contract: TokenContract) -> tuple[str, ...]:
    """Mend the generation config of `model` (in place) where it cannot be saved; gives a sentence for the user then.

    Backspace is kept from generators that do not know the action, and ids without a token, of which training knows
    nothing.
    """
    notes: tuple[str, ...] = ()
    generation = model.generation_config
    if generation is None:
        return notes
    never = {contract.backspace_id, *np.flatnonzero(~contract.has_token()).tolist()}
    generation.suppress_tokens = sorted(never.union(generation.suppress_tokens or ()))
    model.generation_config, left_out = _savable(generation)
    if left_out:
        words = ", ".join(f"{name}={value!r}" for name, value in left_out.items())
        notes += (
            f"checkpoints and exports leave {words} out of generation_config.json: transformers refuses to "
            "save that beside the other values there",
        )
    return notes


def _savable(config: GenerationConfig) -> tuple[GenerationConfig, dict[str, object]]:
    """`config` without the fields that transformers refuses to save beside the others, and these fields.

    A field is taken over once a config that has it can be saved, until none of the rest is such a field.
    """
    if _can_be_saved(config):
        return config, {}
    first = ("eos_token_id", "suppress_tokens")
    names = [name for name in config.to_diff_dict() if name not in (*first, "transformers_version")]
    kept, pending = GenerationConfig(), [*first, *names]
    progress = True
    while progress:
        progress = False
        for name in list(pending):
            trial = copy.deepcopy(kept)
            setattr(trial, name, getattr(config, name))
            if _can_be_saved(trial):
                kept, progress = trial, True
                pending.remove(name)
    return kept, {name: getattr(config, name) for name in pending}


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
