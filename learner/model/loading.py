"""The causal language model, made or loaded, and whether the learner can train it.

It can where logits are hidden state times output embedding, and where attention takes any mask. Known obstacles are
refused by name. Since nobody can list them all, a small tree is then run through the model and compared with its two
texts run alone: what no name gives away (positions taken from the mask, recurrence, an odd output layer) shows there.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from learner.ranks import decoder_layers
from learner.settings.model import Dtype, PretrainedModelSettings, ScratchModelSettings

PACKAGE_PREFIX = "package:"

_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale", "mup_width_scale")
_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_PROBE_TOLERANCE_HALF = 0.15
"""Largest difference allowed, as a share of the logits' spread: above rounding, below a wrong mask."""


@dataclass(frozen=True)
class ModelSource:
    """Where transformers finds a model: a hub name or folder, and a file in it if it is GGUF."""

    name: str
    gguf_file: str | None
    revision: str | None

    def arguments(self) -> dict[str, object]:
        """Of `from_pretrained`. No remote code is said wherever we load: left out, transformers asks at a terminal."""
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"revision": self.revision, "trust_remote_code": False, **gguf}


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


def load_tokenizer(settings: PretrainedModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a pretrained model."""
    source = locate_model(settings)
    return AutoTokenizer.from_pretrained(source.name, **source.arguments())


def load_model(
    settings: ScratchModelSettings | PretrainedModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    param_dtype: Dtype | None = None,
) -> PreTrainedModel:
    """The model in evaluation mode, on the CPU, with torch's own attention, without a backspace action. param_dtype: of
    all its parameters; None = `settings.dtype`, which its config says in any case."""
    dtype: torch.dtype = getattr(torch, param_dtype or settings.dtype)
    if isinstance(settings, ScratchModelSettings):
        model = _make_model(settings, tokenizer, dtype)
    else:
        model = _load_pretrained(settings, dtype)
    model.config.dtype = getattr(torch, settings.dtype)
    return model


def _make_model(
    settings: ScratchModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    if settings.architecture == "llama":
        own: dict[str, object] = {
            "intermediate_size": settings.intermediate_size,
            "num_key_value_heads": settings.num_key_value_heads or settings.num_heads,
        }
    else:
        # No dropout: values and stored log-probabilities are of the model, not of a random sub-network.
        own = {"n_inner": settings.intermediate_size, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = AutoConfig.for_model(
        settings.architecture,
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=settings.tie_embeddings,
        initializer_range=settings.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def _load_pretrained(settings: PretrainedModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    source = locate_model(settings)
    if source.gguf_file is None:
        folder = Path(source.name)
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles and not any(folder.glob("*.safetensors")):  # transformers would say that it lacks another file
            raise ValueError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read: save the "
                "model as safetensors where you trust it, e.g. with transformers' save_pretrained"
            )
        own: dict[str, object] = {"use_safetensors": True}  # of a name on the hub, too
    else:
        # Dequantized on load: a quantized model can neither be trained nor saved in the usual format.
        own = {"quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        source.name, dtype=dtype, attn_implementation="sdpa", **source.arguments(), **own
    )
    if source.gguf_file is not None:
        model.config.quantization_config = None
        del model.config.quantization_config
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep the inputs of the decoder layers only, and run each layer again in the backward pass; in place, before the
    model is shared among ranks. Names of parameters stay, and gradients are the same bit for bit."""
    # The library's own checkpointing works in training mode only, and the policy is trained in evaluation mode.
    for layer in decoder_layers(model):
        # No random numbers are drawn in evaluation mode, so their state needs no restoring.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def check_supported(model: PreTrainedModel) -> None:
    """Refuse what the learner would train wrongly, with a ValueError that names the property that is in the way."""
    obstacle = next(_obstacles(model), None)
    if obstacle is not None:
        raise ValueError(f"this model is not supported: {obstacle}; choose another one")


def _obstacles(model: PreTrainedModel) -> Iterator[str]:
    """Each is looked for where there is none before it."""
    config = model.config.get_text_config()
    for name in _LOGIT_CAPS:
        if getattr(config, name, None):
            yield f"it caps its logits ({name}={getattr(config, name)})"
    for name in _LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            yield f"it scales its logits ({name}={getattr(config, name)})"
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or []
    is_windowed = getattr(config, "use_sliding_window", True) or "sliding_attention" in layer_types
    if window and is_windowed and window < config.max_position_embeddings:
        yield f"its attention is limited to a window (sliding_window={window})"
    head = model.get_output_embeddings()
    if head is None or not isinstance(head, torch.nn.Linear):
        yield "its output embedding is not a plain linear layer"
    if head.bias is not None:
        yield "its output embedding has a bias"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        yield "it takes no position ids, so branches of a tree cannot be told apart"
    difference = _probe(model)
    if not difference <= _PROBE_TOLERANCE.get(head.weight.dtype, _PROBE_TOLERANCE_HALF):
        yield f"texts in a tree do not give the logits that they give alone (relative difference {difference:.2g})"


@torch.no_grad()  # type: ignore[untyped-decorator]
def _probe(model: PreTrainedModel) -> float:
    """Largest difference between the logits of two texts in one tree and of each alone, in standard deviations."""
    head = model.get_output_embeddings()
    device = head.weight.device
    shared, left, right = [1, 2], [3, 4], [4, 5]
    size = model.config.get_text_config().vocab_size
    texts = torch.tensor([shared + left, shared + right], device=device) % size
    nodes = torch.tensor([shared + left + right], device=device) % size
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]], device=device)
    mask = torch.ones(6, 6, dtype=torch.bool, device=device).tril()
    mask[4:, 2:4] = False

    was_training = model.training
    model.eval()
    alone = model(input_ids=texts, use_cache=False).logits.float()
    hidden = model.base_model(
        input_ids=nodes, attention_mask=mask[None, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    model.train(was_training)
    tree = head(hidden)[0].float()
    expected = torch.cat([alone[0], alone[1, 2:]])
    return float((tree - expected).abs().max() / expected.std())
