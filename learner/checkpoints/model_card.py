"""The README.md that lies beside saved weights: what the model is, how it was trained, how to generate with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from learner.checkpoints.store import Progress

GENERATION_LOOP = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = ".", "PROMPT"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
backspace, eos = model.config.backspace_token_id, model.generation_config.eos_token_id  # an id, or several
no_token = [i for i in model.generation_config.suppress_tokens if i != backspace]  # ids that are never chosen
prompt = tokenizer(text)["input_ids"]
ids = list(prompt)
for _ in range(256):  # actions: tokens written and tokens taken back
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].float()
    logits[no_token] = -torch.inf
    if len(ids) == len(prompt):
        logits[backspace] = -torch.inf  # the prompt cannot be taken back
    action = int(torch.multinomial(logits.softmax(-1), 1))
    if action in (eos if isinstance(eos, list) else [eos]):
        break
    ids = ids[:-1] if action == backspace else [*ids, action]
print(tokenizer.decode(ids[len(prompt):]))
"""
"""Sampling in plain transformers, backspace included; a test runs it as it stands in the card."""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; what is not known stays out of it.

    config: as in config.json. base_model: where training started from. license: identifier, as the hub writes it.
    shows_backspace: whether demonstrations of this training hold tokens that are taken back. settings, numbers: how it
    was trained, and what was measured of these weights; label -> words.
    """

    config: Mapping[str, object]
    progress: Progress
    base_model: str | None = None
    license: str | None = None
    shows_backspace: bool | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The card of a whole model, in Markdown, with the front matter that the Hugging Face hub reads."""
    return f"""{_front_matter(facts, "transformers")}
# {facts.config["model_type"]} trained with sequencematch

{_summary(facts)}

{_backspace_section(facts)}## Training

{_tables(facts)}"""


def adapter_card(facts: CardFacts) -> str:
    """The card of adapters alone, for peft."""
    base, backspace_id = facts.base_model or "BASE MODEL", facts.config.get("backspace_token_id")
    return f"""{_front_matter(facts, "peft")}
# Adapter of {facts.config["model_type"]} trained with sequencematch

Low-rank adapters and the whole output embedding, for the base model. Together:

{_summary(facts)}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
base.resize_token_embeddings({facts.config["vocab_size"]}, mean_resizing=False)  # room for backspace, where it has none
model = PeftModel.from_pretrained(base, ".")
```

The backspace action has id {backspace_id}. It never stands in the model's input: when the model chooses it, the
last generated token is removed. The card of a whole export (`sequencematch export` without `--adapter-only`) shows the
loop; a generator that does not know the action must never sample it (`suppress_tokens=[{backspace_id}]`).

## Training

{_tables(facts)}"""


def _summary(facts: CardFacts) -> str:
    """What the weights are: of a control it must not be said that it takes tokens back."""
    paper = "[SequenceMatch, arXiv 2306.05426](https://arxiv.org/abs/2306.05426)"
    if facts.shows_backspace is None:
        return f"A causal language model with an action that takes a token back\n({paper})."
    if facts.shows_backspace:
        return f"A causal language model that can take back what it wrote\n({paper})."
    return (
        "A causal language model. **It was not taught to take tokens back**: no demonstration of the training below\n"
        f"holds a token that is taken back, though its vocabulary has an action for it ({paper})."
    )


def _front_matter(facts: CardFacts, library: str) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [sequencematch]"]
    if facts.license is not None:
        lines.append(f"license: {facts.license}")
    if facts.base_model is not None and ":" not in facts.base_model:  # the hub knows no files of packages
        lines.append(f"base_model: {facts.base_model}")
    return "\n".join(["---", *lines, "---", ""])


def _tables(facts: CardFacts) -> str:
    progress = facts.progress
    stage = f"`{progress.stage}`, step {progress.step} of {progress.stage_steps}"
    trained = _table(
        ({"base model": facts.base_model} if facts.base_model else {}) | {"stage": stage, **facts.settings}
    )
    return f"{trained}\n## Measured on held-out examples\n\n{_table(facts.numbers)}" if facts.numbers else trained


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {words} |" for label, words in rows.items()), ""])


def _backspace_section(facts: CardFacts) -> str:
    backspace_id = facts.config.get("backspace_token_id")
    if backspace_id is None:
        return ""
    return f"""The vocabulary holds a backspace action, id {backspace_id} (`backspace_token_id` in `config.json`).
It never stands in the model's input: when the model chooses it, the last generated token is removed and generation goes
on from the shorter text; it may not be chosen at the end of the prompt.

## Generate

    sequencematch generate FOLDER --prompt "PROMPT"

does it inside vLLM and shows what was taken back. In plain transformers:

```python
{GENERATION_LOOP}```

A generator that does not know the action must never sample it. `generation_config.json` says so (`suppress_tokens`),
which `model.generate` of transformers honors; tell others with each request, e.g. by `logit_bias`
of `{{{backspace_id}: -100}}`.

"""
