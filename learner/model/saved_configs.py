"""The two configs that lie beside a model's weights: made to say what training does, and to be savable.

transformers stops generation at the `<eos>` of generation_config.json, this program at the one of the tokenizer, and
the two may differ (the tokenizer of a chat model on its base model). transformers also loads configs that it refuses to
save. Both are mended when the model is loaded, so that no training ends in a model that cannot be saved, or that never
stops.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from buffer.schema import TokenContract


def mend_configs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contract: TokenContract
) -> tuple[str, ...]:
    """Mend config and generation config of `model` (in place); gives a sentence for the user about each change.

    The `<eos>` of the tokenizer becomes the only one: in training, too, no other token ends a text. Backspace is kept
    from generators that do not know the action, and ids without a token, of which training knows nothing.
    """
    notes = _align_eos(model, tokenizer)
    generation = model.generation_config
    if generation is None:
        return notes
    never = {contract.backspace_id, *np.flatnonzero(~contract.has_token()).tolist()}
    generation.suppress_tokens = sorted(never.union(generation.suppress_tokens or ()))
    model.generation_config, left_out = _savable(generation)
    if left_out:
        notes += (
            f"checkpoints and exports leave {_words(left_out)} out of generation_config.json: transformers refuses to "
            "save that beside the other values there",
        )
    return notes


def _align_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    eos_id = int(tokenizer.eos_token_id)
    text_config, generation = model.config.get_text_config(), model.generation_config
    named = {"config.json": text_config.eos_token_id}
    if generation is not None:
        named["generation_config.json"] = generation.eos_token_id
        generation.eos_token_id = eos_id
    model.config.eos_token_id = text_config.eos_token_id = eos_id
    others = {file: found for file, found in named.items() if found not in (eos_id, [eos_id])}
    if not others:
        return ()
    words = " and ".join(f"{found} in {file}" for file, found in others.items())
    return (
        f"a text ends with the tokenizer's <eos> alone, {tokenizer.eos_token} (id {eos_id}), in training as in "
        f"checkpoints and exports; the model came with {words}",
    )


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


def _words(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
