"""Export of a trained model: a folder that stands alone, in Hugging Face format or as a peft adapter.

Checkpoints hold whole weights already (adapters merged, 4-bit layers restored, rounded to `model.dtype`), so an export
copies them bit for bit and leaves out what only training needs.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from buffer.disk import writing_to
from launch.errors import UserError
from launch.export.card import card_facts
from launch.run_folder.checkpoints import checkpoint_of, run_of
from launch.run_folder.folder import CONFIG_FILE


@dataclass(frozen=True)
class Export:
    """What was exported. license: as the card states it; None where nothing told it."""

    checkpoint: Path
    out: Path
    license: str | None


def export(
    source: Path, out: Path, *, stage: str | None = None, adapter_only: bool = False, license_id: str | None = None
) -> Export:
    """Export a checkpoint, or the newest one of a run's stage; `out` appears when complete.

    stage: of the run; None takes the recipe's `result`.
    adapter_only: the adapters and the trained output embedding, for peft; else the whole model.
    license_id: for the card; None takes that of the base model.

    Raises:
        UserError: `out` exists, `source` is neither a checkpoint nor a run with one, or adapters are missing.
        ValueError, OSError: a file of the checkpoint cannot be read, or `out` cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists already: name a folder that does not, or remove it")
    checkpoint = checkpoint_of(source, stage)
    if not (checkpoint / "config.json").is_file():
        raise UserError(
            f"{source} is neither a run folder nor a checkpoint: it has no {CONFIG_FILE} and no config.json (a run "
            "keeps its checkpoints in RUN/checkpoints/STAGE/step-N)"
        )
    run = run_of(source)
    from transformers import AutoTokenizer

    from learner.checkpoints.checkpoint import ADAPTER_FOLDER, CONFIGURATION_FILES, WEIGHTS_FILE
    from learner.checkpoints.model_card import adapter_card, model_card
    from learner.checkpoints.store import read_progress

    progress = read_progress(checkpoint)
    if adapter_only and not (checkpoint / ADAPTER_FOLDER).is_dir():
        raise UserError(f"{checkpoint} has no adapters, it was trained in full: export it without --adapter-only")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    facts = card_facts(checkpoint, run, progress, license_id)
    temporary = out.with_name(f"{out.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)  # of an export that was killed
    try:
        with writing_to(temporary):
            temporary.mkdir(parents=True)
            if adapter_only:
                shutil.copytree(checkpoint / ADAPTER_FOLDER, temporary, dirs_exist_ok=True)
            else:
                for name in (*CONFIGURATION_FILES, WEIGHTS_FILE):
                    shutil.copyfile(checkpoint / name, temporary / name)
            tokenizer.save_pretrained(temporary)
            card = adapter_card(facts) if adapter_only else model_card(facts)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already, if all went well
    return Export(checkpoint, out, facts.license)
