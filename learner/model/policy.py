"""The policy: a causal language model one of whose ids means `<backspace>`.

The id is kept in the model's `config.backspace_token_id`, which `save_pretrained` writes: a model that carries it is
taken up as it is. One that does not gets a new row for it (`learner.model.backspace_row`). The two configs beside the
weights are made to say what training does, and to be savable: transformers stops generation at each `<eos>` of
generation_config.json, and demonstrations end with the one of the tokenizer, which may not be among them; and it loads
configs that it refuses to save.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from buffer.experts.tokenizer import token_contract
from buffer.trajectory.schema import TokenContract
from learner.model.adapters import add_adapters, declare_untied, quantize_linear_layers
from learner.model.backspace_row import initialize_backspace_row
from learner.model.loading import check_supported, load_model, load_tokenizer
from learner.precision import hold_trained_parameters
from learner.settings.model import Dtype, PretrainedModelSettings, ScratchModelSettings


@dataclass(frozen=True)
class Policy:
    """is_row_new: the model was trained, but never with this backspace: its row says nothing yet. notes: sentences for
    the user about what was changed in the model's configs. other_eos_ids: ids that end a text too."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    backspace_id: int
    is_row_new: bool
    notes: tuple[str, ...] = ()
    other_eos_ids: tuple[int, ...] = ()


def load_policy(
    settings: ScratchModelSettings | PretrainedModelSettings,
    task_tokenizer: PreTrainedTokenizerBase | None = None,
    param_dtype: Dtype | None = None,
) -> Policy:
    """Load or make the model, give it a backspace action and adapters, and check that the learner can train it.

    task_tokenizer: needed by a model from scratch, refused by any other. param_dtype: of the trained parameters; None
    leaves those of the model in its own format.

    Raises:
        ValueError: the model is unsupported, there is no room for backspace, no tokenizer, no `<eos>`, or adapters or
            4-bit layers cannot be had as asked.
    """
    if isinstance(settings, PretrainedModelSettings):
        if task_tokenizer is not None:
            raise ValueError("a pretrained model brings its own tokenizer; pass task_tokenizer=None")
        tokenizer = load_tokenizer(settings)
    elif task_tokenizer is None:
        raise ValueError("a model from scratch needs the tokenizer of a task; this task has none")
    else:
        tokenizer = task_tokenizer
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no <eos> token, so no answer could end; set its eos_token")
    has_frozen = isinstance(settings, PretrainedModelSettings) and settings.adapter is not None
    # What is held in float32 is not rounded on loading. A weight that is a number of bfloat16 has to move by half a
    # step of that format before its rounded value changes; those of a source in float32 lie anywhere between.
    model = load_model(settings, tokenizer, None if has_frozen else param_dtype)
    notes: list[str] = []
    _keep_two_embeddings(model, notes)
    backspace_id = choose_backspace_id(tokenizer, model, settings)
    other_eos_ids = _align_eos(model, tokenizer, backspace_id, notes)
    vocab_size: int = model.get_input_embeddings().weight.shape[0]
    contract = token_contract(tokenizer, backspace_id, vocab_size, other_eos_ids)
    is_new = getattr(model.config, "backspace_token_id", None) != backspace_id
    if is_new:
        initialize_backspace_row(model, backspace_id, settings.seed, contract.ids_without_token)
        model.config.backspace_token_id = backspace_id
    _mend_generation_config(model, contract, notes)
    if isinstance(settings, PretrainedModelSettings):
        if settings.quantization is not None:
            quantize_linear_layers(model)
        if settings.adapter is not None:
            add_adapters(model, settings.adapter, settings.name, settings.revision, settings.seed)
    check_supported(model)
    if param_dtype is not None:
        hold_trained_parameters(model, getattr(torch, param_dtype))
    is_row_new = is_new and isinstance(settings, PretrainedModelSettings)
    return Policy(model, tokenizer, backspace_id, is_row_new, tuple(notes), other_eos_ids)


def choose_backspace_id(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings: ScratchModelSettings | PretrainedModelSettings
) -> int:
    """Id of `settings.backspace_token`; added to tokenizer and embeddings (in place) where it is missing. ValueError:
    adding a row is not allowed, or the token has another meaning."""
    token = settings.backspace_token
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        if not (isinstance(settings, PretrainedModelSettings) and settings.add_backspace_row):
            reserved = ", ".join(str(special) for special in tokenizer.all_special_tokens)
            raise ValueError(
                f"the vocabulary has no token {token!r} for backspace: set backspace_token to a reserved "
                f"token that the texts never use (special tokens here: {reserved}), or allow add_backspace_row"
            )
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
        vocabulary = tokenizer.get_vocab()
    backspace_id = int(vocabulary[token])
    if len(namesakes := sorted(name for name, found in vocabulary.items() if found == backspace_id)) > 1:
        raise ValueError(
            f"the tokenizer gives {' and '.join(namesakes)} the same id {backspace_id}, because its vocabulary has "
            "holes: set backspace_token to a reserved token that the texts never use"
        )
    if backspace_id in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise ValueError(
            f"backspace_token {token!r} is the tokenizer's <bos>, <eos> or padding token; choose another one"
        )
    if backspace_id >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(backspace_id + 1, mean_resizing=False)
    return backspace_id


def _keep_two_embeddings(model: PreTrainedModel, notes: list[str]) -> None:
    """A file may hold two different matrices though its config ties them. transformers loads both, and would tie them
    when they are resized for backspace. notes: gets a sentence for the user then."""
    head = model.get_output_embeddings()
    is_tied = head is None or head.weight is model.get_input_embeddings().weight
    if not is_tied and model.config.get_text_config().tie_word_embeddings:
        declare_untied(model)
        notes.append(
            "config.json ties input and output embedding, and the file of the weights holds two different matrices: "
            "both are kept, and tie_word_embeddings is false from now on"
        )


def _align_eos(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, backspace_id: int, notes: list[str]
) -> tuple[int, ...]:
    """Make config and generation config of `model` (in place) name the `<eos>` ids that end a text in training.

    The tokenizer's `<eos>` is the first. Where a config lists several, as those of chat models do, each of them ends a
    text; a single other one is of another tokenizer and goes. Gives the ids beside the tokenizer's, ascending. notes:
    gets a sentence where a config named something else.
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
    if wrong := [f"{found} in {file}" for file, found in named.items() if not _names_some_of(found, ids)]:
        tokens = ", ".join(f"{tokenizer.convert_ids_to_tokens(token_id)} (id {token_id})" for token_id in ids)
        notes.append(
            f"a text ends with {tokens} alone, in training as in checkpoints and exports; the model came with "
            f"{' and '.join(wrong)}"
        )
    return tuple(others)


def _names_some_of(found: object, ids: list[int]) -> bool:
    """Whether a config's `<eos>` is the first of `ids`, or a list with it and no other ids than these."""
    named = found if isinstance(found, list) else [found]
    return ids[0] in named and set(named) <= set(ids)


def _mend_generation_config(model: PreTrainedModel, contract: TokenContract, notes: list[str]) -> None:
    """Keep backspace, and ids without a token, from generators that do not know the action, and leave out what cannot
    be saved; in place."""
    generation = model.generation_config
    if generation is None:
        return
    never = {contract.backspace_id, *np.flatnonzero(~contract.has_token()).tolist()}
    generation.suppress_tokens = sorted(never.union(generation.suppress_tokens or ()))
    model.generation_config, left_out = _savable(generation)
    if left_out:
        words = ", ".join(f"{name}={value!r}" for name, value in left_out.items())
        notes.append(
            f"checkpoints and exports leave {words} out of generation_config.json: transformers refuses to save that "
            "beside the other values there"
        )


def _savable(config: GenerationConfig) -> tuple[GenerationConfig, dict[str, object]]:
    """`config` without the fields that transformers refuses to save beside the others, and these fields. A field is
    taken over once a config that has it can be saved, until none of the rest is such a field."""
    if _can_be_saved(config):
        return config, {}
    kept = GenerationConfig(eos_token_id=config.eos_token_id, suppress_tokens=config.suppress_tokens)
    pending = {name: getattr(config, name) for name in config.to_diff_dict() if name != "transformers_version"}
    while True:
        for name, value in pending.items():
            trial = copy.deepcopy(kept)
            setattr(trial, name, value)
            if _can_be_saved(trial):
                kept = trial
                del pending[name]
                break
        else:
            return kept, pending


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
