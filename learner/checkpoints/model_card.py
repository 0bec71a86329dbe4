"""The README.md that lies beside saved weights: what the model is, how it was trained, how to generate with it."""

from __future__ import annotations

from dataclasses import dataclass, field

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

    name: of the architecture. base_model: where training started from. license: identifier, as the hub writes it.
    shows_backspace: whether demonstrations of this training hold tokens that are taken back. settings: how it was
    trained, label -> words. numbers: what was measured of these weights, label -> words. versions: of programs, as
    `torch 2.13.0`.
    """

    name: str
    backspace_id: int | None
    stage: str
    step: int
    stage_steps: int
    vocab_size: int
    base_model: str | None = None
    license: str | None = None
    shows_backspace: bool | None = None
    settings: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    versions: tuple[str, ...] = ()


def model_card(facts: CardFacts) -> str:
    """The card of a whole model, in Markdown, with the front matter that the Hugging Face hub reads."""
    return f"""{_front_matter(facts, "transformers")}
# {facts.name} trained with sequencematch

{_summary(facts)}

{_backspace_section(facts)}## Training

{_table(facts)}{_numbers(facts)}"""


def adapter_card(facts: CardFacts) -> str:
    """The card of adapters alone, for peft."""
    base = facts.base_model or "BASE MODEL"
    return f"""{_front_matter(facts, "peft")}
# Adapter of {facts.name} trained with sequencematch

Low-rank adapters and the whole output embedding, for the base model. Together:

{_summary(facts)}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
base.resize_token_embeddings({facts.vocab_size}, mean_resizing=False)  # room for backspace, where it has none
model = PeftModel.from_pretrained(base, ".")
```

The backspace action has id {facts.backspace_id}. It never stands in the model's input: when the model chooses it, the
last generated token is removed. The card of a whole export (`sequencematch export` without `--adapter-only`) shows the
loop; a generator that does not know the action must never sample it (`suppress_tokens=[{facts.backspace_id}]`).

## Training

{_table(facts)}{_numbers(facts)}"""


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


def _numbers(facts: CardFacts) -> str:
    if not facts.numbers:
        return ""
    lines = [f"| {label} | {words} |" for label, words in facts.numbers.items()]
    return "\n".join(["", "## Measured on held-out examples", "", "| | |", "|---|---|", *lines, ""])


def _front_matter(facts: CardFacts, library: str) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [sequencematch]"]
    if facts.license is not None:
        lines.append(f"license: {facts.license}")
    if facts.base_model is not None and ":" not in facts.base_model:  # the hub knows no files of packages
        lines.append(f"base_model: {facts.base_model}")
    return "\n".join(["---", *lines, "---", ""])


def _table(facts: CardFacts) -> str:
    rows = {
        "base model": facts.base_model,
        "stage": f"`{facts.stage}`, step {facts.step} of {facts.stage_steps}",
        **facts.settings,
        "made with": ", ".join(facts.versions) or None,
    }
    lines = [f"| {label} | {words} |" for label, words in rows.items() if words is not None]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _backspace_section(facts: CardFacts) -> str:
    if facts.backspace_id is None:
        return ""
    return f"""The vocabulary holds a backspace action, id {facts.backspace_id} (`backspace_token_id` in `config.json`).
It never stands in the model's input: when the model chooses it, the last generated token is removed and generation goes
on from the shorter text; it may not be chosen at the end of the prompt.

## Generate

    sequencematch generate FOLDER --prompt "PROMPT"

does it inside vLLM and shows what was taken back. In plain transformers:

```python
{GENERATION_LOOP}```

A generator that does not know the action must never sample it. `generation_config.json` says so (`suppress_tokens`),
which `model.generate` of transformers honours; tell others with each request, e.g. by `logit_bias`
of `{{{facts.backspace_id}: -100}}`.

"""
