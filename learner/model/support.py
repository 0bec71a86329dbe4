"""Which models the learner can train: those whose logits are hidden state times output embedding, and whose
attention takes any mask.

Known obstacles are refused by name. Since nobody can list them all, a small tree is then run through the
model and compared with its two texts run alone: what no name gives away (positions taken from the mask,
recurrence, an odd output layer) shows there.
"""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale", "mup_width_scale")
_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_PROBE_TOLERANCE_HALF = 0.15
"""Largest difference allowed, as a share of the logits' spread: above rounding, below a wrong mask."""


def check_supported(model: PreTrainedModel) -> None:
    """Refuse what the learner would train wrongly, with a ValueError that names the property that is in the way."""
    config = model.config.get_text_config()
    for name in _LOGIT_CAPS:
        if getattr(config, name, None):
            raise ValueError(_refusal(f"it caps its logits ({name}={getattr(config, name)})"))
    for name in _LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(_refusal(f"it scales its logits ({name}={getattr(config, name)})"))
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or []
    is_windowed = getattr(config, "use_sliding_window", True) or "sliding_attention" in layer_types
    if window and is_windowed and window < config.max_position_embeddings:
        raise ValueError(_refusal(f"its attention is limited to a window (sliding_window={window})"))
    head = model.get_output_embeddings()
    if head is None or not isinstance(head, torch.nn.Linear):
        raise ValueError(_refusal("its output embedding is not a plain linear layer"))
    if head.bias is not None:
        raise ValueError(_refusal("its output embedding has a bias"))
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(_refusal("it takes no position ids, so branches of a tree cannot be told apart"))
    _probe(model)


def _refusal(reason: str) -> str:
    return f"this model is not supported: {reason}; choose another one"


@torch.no_grad()  # type: ignore[untyped-decorator]
def _probe(model: PreTrainedModel) -> None:
    """Two texts that part after two tokens, once as a tree and once alone."""
    head = model.get_output_embeddings()
    device = head.weight.device
    trunk, left, right = [1, 2], [3, 4], [4, 5]
    size = model.config.get_text_config().vocab_size
    texts = torch.tensor([trunk + left, trunk + right], device=device) % size
    nodes = torch.tensor([trunk + left + right], device=device) % size
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
    difference = float((tree - expected).abs().max() / expected.std())
    if not difference <= _PROBE_TOLERANCE.get(head.weight.dtype, _PROBE_TOLERANCE_HALF):
        raise ValueError(
            _refusal(
                "texts packed into a tree do not give the logits that they give alone "
                f"(relative difference {difference:.2g})"
            )
        )
