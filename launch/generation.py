"""Generation from checkpoints at the command line: opening a checkpoint, starting an engine for it, rollouts to show.

The engine lives in the process of the command, which is why nothing here imports vLLM before its environment is set.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.text import Text

from actors.engine.interface import EngineSettings, SamplingSettings, engine_environment
from actors.generator import Generator, PromptGroup
from actors.settings import ActorsSettings
from buffer.trajectory.schema import TokenContract
from buffer.trajectory.staleness import Bool, Int32
from launch.rollout_view import FLOOR_MARK, RolloutView, view_rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Float32 = npt.NDArray[np.float32]

ENGINE = ActorsSettings(dtype="float32", max_concurrent=64, kv_cache_gib=0.5)
ACTIONS_PER_NEW_TOKEN = 4
"""Bound on the actions of `sequencematch generate`, per token that may remain: generous, but finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on disk, and what generation needs to know of it. max_length: its context, in tokens."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    contract: TokenContract
    max_length: int


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint holds beside weights; ValueError or OSError where it is no model with a backspace action."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"{folder} is not a checkpoint: it has no config.json (a run keeps its checkpoints in "
            "RUN/checkpoints/STAGE/step-N)"
        )
    backspace_id = json.loads(config_file.read_text(encoding="utf-8")).get("backspace_token_id")
    if backspace_id is None:
        raise ValueError(
            f"{folder} has no backspace action (backspace_token_id in its config.json): "
            "train the model with `sequencematch train` first"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer_config.json): copy the tokenizer files of its model there"
        )
    from transformers import AutoConfig, AutoTokenizer

    from buffer.experts.tokenizer import token_contract

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    contract = token_contract(tokenizer, int(backspace_id), int(config.vocab_size))
    return Checkpoint(folder, tokenizer, contract, int(config.max_position_embeddings))


@contextmanager
def running_generator(checkpoint: Checkpoint, max_length: int, seed: int) -> Iterator[Generator]:
    """An engine without weights yet, one per process. max_length: of the longest text, with its prompt, in tokens."""
    length = min(max_length, checkpoint.max_length)
    settings = EngineSettings(str(checkpoint.folder), length, ENGINE, seed=seed, load_format="dummy")
    os.environ.update(engine_environment())
    with library_chatter_held():
        generator = Generator(settings, checkpoint.contract)
    try:
        yield generator
    finally:
        generator.close()


@contextmanager
def library_chatter_held() -> Iterator[None]:
    """Keep what libraries write to stderr, from C++ too, off the terminal; it is shown if the block fails."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            if failed:
                held.seek(0)
                os.write(2, held.read())


@contextmanager
def progress_bar(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` rollouts, gone when it is done; gives the function that advances it."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


def encode_prompt(checkpoint: Checkpoint, prompt: str) -> list[int]:
    """Token ids; ValueError if there are none, if they fill the whole context, or for characters without a token."""
    from tokenizers.models import WordLevel

    from buffer.experts.tokenizer import prompt_prefix

    actions = [checkpoint.contract.backspace_id, *checkpoint.contract.eos_ids]
    for token in checkpoint.tokenizer.convert_ids_to_tokens(actions):
        if token in prompt:
            raise ValueError(f"the prompt contains {token!r}, which is an action and no text: leave it out")
    model = checkpoint.tokenizer.backend_tokenizer.model if checkpoint.tokenizer.is_fast else None
    if isinstance(model, WordLevel) and checkpoint.tokenizer.unk_token is None:  # its own error names no character
        vocabulary = checkpoint.tokenizer.get_vocab()
        if unknown := sorted(set(prompt) - set(vocabulary)):
            known = "".join(sorted(token for token in vocabulary if len(token) == 1))
            raise ValueError(f"the model has no token for {''.join(unknown)!r}; its characters are {known!r}")
    text_ids: list[int] = checkpoint.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = prompt_prefix(checkpoint.tokenizer) + text_ids
    if not ids:
        raise ValueError("the prompt is empty, and this tokenizer puts nothing before a text: give at least one token")
    if len(ids) >= checkpoint.max_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the model's context holds {checkpoint.max_length} with the answer: "
            "shorten the prompt"
        )
    return ids


@dataclass(frozen=True, eq=False)
class Rollout(RolloutView):
    """A generated rollout; `text` is its answer, `segments` has what was deleted too.

    actions: [T] token ids as chosen, backspaces included. logprobs: [T] of each action under the distribution that it
    was sampled from, in nats. is_backspace: [T].
    """

    actions: Int32
    logprobs: Float32
    is_backspace: Bool

    @property
    def num_deletions(self) -> int:
        """Tokens that were deleted."""
        return int(self.is_backspace.sum())


def generate(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    console: Console,
) -> list[Rollout]:
    """`count` rollouts of each prompt (token ids), prompt by prompt, by one engine. Each ends at `<eos>`, at
    `max_new_tokens`, or where the model's context is full.
    """
    sampling = SamplingSettings(
        max_new_tokens=max_new_tokens,
        max_actions=ACTIONS_PER_NEW_TOKEN * max_new_tokens,
        temperature=temperature,
        ban_deleted=temperature == 0.0,  # a greedy policy that takes a token back would write it again, for ever
    )
    group = PromptGroup([np.asarray(ids, dtype=np.int32) for ids in prompts for _ in range(count)], sampling)
    longest = max(map(len, prompts)) + max_new_tokens
    with (
        console.status("starting the engine"),
        running_generator(checkpoint, longest, seed) as generator,
    ):
        generator.load(checkpoint.folder)
        batch = generator.generate({"rollouts": group}, task="generate")["rollouts"]
    return [_rollout(batch, index, checkpoint) for index in range(batch.num_rows)]


def _rollout(batch: pa.RecordBatch, index: int, checkpoint: Checkpoint) -> Rollout:
    view = view_rollout(batch, index, checkpoint.tokenizer, checkpoint.contract)
    actions, logprobs = (batch.column(name)[index].values.to_numpy() for name in ("actions", "logprobs"))
    is_backspace = actions == checkpoint.contract.backspace_id
    return Rollout(view.prompt, view.segments, view.finish_reason, actions, logprobs, is_backspace)


def rollout_text(view: RolloutView, console: Console) -> Text:
    """Prompt and answer with their deletions: as styles where the console has them, else as marks."""
    if console.is_terminal and console.color_system is not None:
        return view.rich()
    return Text(view.prompt + FLOOR_MARK + view.plain())


def rollout_to_json(view: RolloutView) -> dict[str, object]:
    """text: what remains; log: the same with the marks of `RolloutView.plain`; segments: as they were written."""
    return {
        "text": view.text,
        "log": view.plain(),
        "finish_reason": view.finish_reason,
        "segments": [asdict(segment) for segment in view.segments],
    }
