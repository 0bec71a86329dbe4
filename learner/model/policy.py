"""The policy: a causal language model one of whose ids means `<backspace>`.

The id is kept in the model's `config.backspace_token_id`, which `save_pretrained` writes: a model that carries it is
taken up as it is. One that does not gets a new row for it (`learner.model.backspace_row`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from buffer.experts.tokenizer import token_contract
from learner.model.adapters import add_adapters, declare_untied
from learner.model.backspace_row import initialise_backspace_row
from learner.model.quantization import quantise_linear_layers
from learner.model.saved_configs import align_eos, mend_configs
from learner.model.support import check_supported
from learner.precision import hold_trained_parameters
from learner.ranks import decoder_layers
from learner.settings.model import Dtype, PretrainedModelSettings, ScratchModelSettings

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class Policy:
    """is_row_new: the model was trained, but never with this backspace: its row says nothing yet. notes: sentences for
    the user about what was changed in the model's configs. other_eos_ids: ids that end a text too."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    backspace_id: int
    eos_id: int
    is_row_new: bool
    notes: tuple[str, ...] = ()
    other_eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelSource:
    """Where transformers finds a model: a hub name or folder, and a file in it if it is GGUF."""

    name: str
    gguf_file: str | None
    revision: str | None


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
    notes = _keep_two_embeddings(model)
    backspace_id = choose_backspace_id(tokenizer, model, settings)
    other_eos_ids, of_eos = align_eos(model, tokenizer, backspace_id)
    vocab_size: int = model.get_input_embeddings().weight.shape[0]
    contract = token_contract(tokenizer, backspace_id, vocab_size, other_eos_ids)
    is_new = getattr(model.config, "backspace_token_id", None) != backspace_id
    if is_new:
        initialise_backspace_row(model, backspace_id, settings.seed, contract.ids_without_token)
        model.config.backspace_token_id = backspace_id
    notes += of_eos + mend_configs(model, contract)
    if isinstance(settings, PretrainedModelSettings):
        if settings.quantization is not None:
            quantise_linear_layers(model)
        if settings.adapter is not None:
            add_adapters(model, settings.adapter, settings.name, settings.revision, settings.seed)
    check_supported(model)
    if param_dtype is not None:
        hold_trained_parameters(model, getattr(torch, param_dtype))
    is_row_new = is_new and isinstance(settings, PretrainedModelSettings)
    return Policy(model, tokenizer, backspace_id, contract.eos_id, is_row_new, notes, other_eos_ids)


def load_model(
    settings: ScratchModelSettings | PretrainedModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    param_dtype: Dtype | None = None,
) -> PreTrainedModel:
    """The model in evaluation mode, on the CPU, with torch's own attention, without a backspace action.

    param_dtype: of all its parameters; None = `settings.dtype`, which its config says in any case.
    """
    dtype: torch.dtype = getattr(torch, param_dtype or settings.dtype)
    if isinstance(settings, ScratchModelSettings):
        model = _make_model(settings, tokenizer, dtype)
    else:
        model = _load_pretrained(settings, dtype)
    model.config.dtype = getattr(torch, settings.dtype)
    return model


def _load_pretrained(settings: PretrainedModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    source = locate_model(settings)
    arguments: dict[str, object] = {
        "dtype": dtype,
        "attn_implementation": "sdpa",
        "revision": source.revision,
        "trust_remote_code": False,  # said wherever we load: left out, transformers asks at a terminal
    }
    if source.gguf_file is None:
        folder = Path(source.name)
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles and not any(folder.glob("*.safetensors")):  # transformers would say that it lacks another file
            raise ValueError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read: save the "
                "model as safetensors where you trust it, e.g. with transformers' save_pretrained"
            )
        arguments["use_safetensors"] = True  # of a name on the hub, too
    else:
        # Dequantised on load: a quantised model can neither be trained nor saved in the usual format.
        arguments |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source.name, **arguments)
    if source.gguf_file is not None:
        model.config.quantization_config = None
        del model.config.quantization_config
    return model


def load_tokenizer(settings: PretrainedModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a pretrained model."""
    source = locate_model(settings)
    arguments = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    return AutoTokenizer.from_pretrained(source.name, revision=source.revision, trust_remote_code=False, **arguments)


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


def _keep_two_embeddings(model: PreTrainedModel) -> tuple[str, ...]:
    """A file may hold two different matrices though its config ties them. transformers loads both, and would tie them
    when they are resized for backspace.
    """
    head = model.get_output_embeddings()
    is_tied = head is None or head.weight is model.get_input_embeddings().weight
    if is_tied or not model.config.get_text_config().tie_word_embeddings:
        return ()
    declare_untied(model)
    return (
        "config.json ties input and output embedding, and the file of the weights holds two different matrices: both "
        "are kept, and tie_word_embeddings is false from now on",
    )


def _make_model(
    settings: ScratchModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    shared = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": settings.tie_embeddings,
        "initializer_range": settings.initializer_range,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if settings.architecture == "llama":
        config: LlamaConfig | GPT2Config = LlamaConfig(
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_key_value_heads or settings.num_heads,
            max_position_embeddings=settings.max_positions,
            **shared,
        )
    else:
        config = GPT2Config(
            n_embd=settings.hidden_size,
            n_inner=settings.intermediate_size,
            n_layer=settings.num_layers,
            n_head=settings.num_heads,
            n_positions=settings.max_positions,
            # No dropout: values and stored log-probabilities are of the model, not of a random sub-network.
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            **shared,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def locate_model(settings: PretrainedModelSettings) -> ModelSource:
    """Where `settings.name` leads; files of packages are looked up (ValueError: there is no such package or file), hub
    names are not."""
    if not settings.name.startswith(PACKAGE_PREFIX):
        return ModelSource(settings.name, None, settings.revision)
    package, _, file = settings.name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model {settings.name!r}: package {package!r} is not installed; install it or name another model"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if path.suffix != ".gguf" or not path.is_file():
        found = sorted(str(other.relative_to(path.parent)) for other in path.parent.glob("*.gguf"))
        raise ValueError(f"model {settings.name!r}: no such GGUF file in package {package!r}; it holds {found}")
    return ModelSource(str(path.parent), path.name, None)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep the inputs of the decoder layers only, and run each layer again in the backward pass; in place, before the
    model is shared among ranks. Names of parameters stay, and gradients are the same bit for bit."""
    # The library's own checkpointing works in training mode only, and the policy is trained in evaluation mode.
    for layer in decoder_layers(model):
        # No random numbers are drawn in evaluation mode, so their state needs no restoring.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
