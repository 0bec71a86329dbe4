"""`sequencematch export`: a trained model as a folder that stands alone, in Hugging Face format or as a peft adapter.

Checkpoints hold whole weights already (adapters merged, 4-bit layers restored, rounded to `model.dtype`), so an export
copies them bit for bit and leaves out what only training needs. The model card tells what they are: gathered from the
checkpoint and, where it has one, from its run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from yaml import YAMLError

from buffer.disk import writing_to
from buffer.settings import Settings
from launch.errors import UserError
from launch.evaluation.results import read_evaluation
from launch.run_folder.checkpoints import checkpoint_of, run_of
from launch.run_folder.folder import CONFIG_FILE, open_run_folder, read_versions
from launch.settings.run import RunSettings
from learner.settings.model import PretrainedModelSettings
from learner.settings.stages import StageSettings, stages_before

if TYPE_CHECKING:
    from learner.checkpoints.model_card import CardFacts
    from learner.checkpoints.store import Progress

_CARD_METRICS = ("accuracy", "recovery", "mauve", "perplexity", "diversity", "backspace_rate")
"""Of an evaluation, in this order; all of them are in evaluation.json."""


@dataclass(frozen=True)
class Export:
    """license: as the card states it; None where nothing told it."""

    checkpoint: Path
    out: Path
    license: str | None


def export(
    source: Path, out: Path, *, stage: str | None = None, adapter_only: bool = False, license_id: str | None = None
) -> Export:
    """Export a checkpoint, or the newest one of a run's stage; `out` appears when complete.

    stage: of the run; None takes the recipe's `result`. adapter_only: the adapters and the trained output embedding,
    for peft. license_id: for the card; None takes that of the base model.

    UserError: `out` exists, `source` is neither a checkpoint nor a run with one, its configuration cannot be read, or
    adapters are missing. ValueError, OSError: a file or the base model's package is missing, or `out` not writable.
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


def card_facts(checkpoint: Path, run: Path | None, progress: Progress, license_id: str | None) -> CardFacts:
    """Facts of a checkpoint, and of the run that made it. UserError, ValueError: see `export`."""
    from learner.checkpoints.model_card import CardFacts

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    settings = None if run is None else open_run_folder(run)[1]
    base = settings.model if settings and isinstance(settings.model, PretrainedModelSettings) else None
    if license_id is None and base is not None:
        license_id = base_license(base)
    trained = {} if settings is None else _training_words(settings, progress.stage)
    if run is not None and (versions := read_versions(run)):
        trained["made with"] = ", ".join(versions)
    return CardFacts(
        config=config,
        progress=progress,
        base_model=None if base is None else base.name,
        license=license_id,
        shows_backspace=None if settings is None else _shows_backspace(settings, progress.stage),
        settings=trained,
        numbers={} if run is None else _measured(run, checkpoint, progress.stage),
    )


def base_license(settings: PretrainedModelSettings) -> str | None:
    """SPDX identifier (as the Hugging Face hub writes it) in the base model's card or GGUF file; None if none is found.

    ValueError: the model names a package that is not installed.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    from learner.model.loading import locate_model

    source = locate_model(settings)
    folder = Path(source.name)
    if source.gguf_file is not None:
        from gguf import GGUFReader

        field = GGUFReader(folder / source.gguf_file).get_field("general.license")
        return None if field is None else str(field.contents())
    try:
        in_folder = folder / "README.md" if folder.is_dir() else None
        card = ModelCard.load(in_folder or Path(hf_hub_download(source.name, "README.md", revision=source.revision)))
    except (OSError, ValueError, YAMLError):  # no card, none that can be read, or no connection
        return None
    return None if card.data.license is None else str(card.data.license)


def _training_words(settings: RunSettings, stage_name: str) -> dict[str, str]:
    """How the stage and those that it builds on were trained, label -> words."""
    lineage = _lineage(settings.stages, stage_name)
    found = {
        "objective": "; then ".join(f"{stage.steps} steps of {_words(stage.objective)}" for stage in lineage),
        "optimizer": _words(lineage[-1].optimizer, "AdamW"),
        "batch": f"{lineage[-1].batch_size} expert trajectories per step",
        "data": _words(settings.task),
        "seed": str(settings.seed),
    }
    if any(stage.objective.uses_noise for stage in lineage):
        found["noise"] = _words(settings.noise)
    if isinstance(settings.model, PretrainedModelSettings) and settings.model.adapter is not None:
        found["adapters"] = _words(settings.model.adapter, "LoRA")
        found["frozen layers"] = settings.model.quantization or settings.model.dtype
    return found


def _shows_backspace(settings: RunSettings, stage_name: str) -> bool:
    """Whether demonstrations that the stage, or one that it builds on, was trained on hold backspaces."""
    if settings.noise.kind == "none" or not settings.actors.rollout.backspace:
        return False
    return any(stage.objective.uses_noise for stage in _lineage(settings.stages, stage_name))


def _measured(run: Path, checkpoint: Path, stage: str) -> dict[str, str]:
    """What the evaluation of a run says of one of its checkpoints, label -> words; nothing if it was not measured."""
    evaluation = read_evaluation(run)
    for each in evaluation.checkpoints if evaluation else ():
        if each.label == stage and each.checkpoint.name == checkpoint.name:
            return {
                f"{name}, {group}": f"{numbers[name].value:.4g}{_error_words(numbers[name].standard_error)}"
                for name in _CARD_METRICS
                for group, numbers in each.metrics.items()
                if name in numbers and numbers[name].value is not None
            }
    return {}


def _error_words(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2g} (standard error)"


def _lineage(stages: tuple[StageSettings, ...], name: str) -> list[StageSettings]:
    """The stages whose training is in the weights of stage `name`, first to last."""
    return [*stages_before(stages, name), *(stage for stage in stages if stage.name == name)]


def _words(settings: Settings, title: str = "") -> str:
    """`name (key=value, ...)`, without what is left open; the name is the title, or what the settings choose."""
    values = {key: value for key, value in settings.model_dump(mode="json").items() if value not in (None, [], {})}
    name = title or str(values.pop("name", None) or values.pop("kind"))
    details = ", ".join(f"{key}={value}" for key, value in values.items())
    return f"{name} ({details})" if details else name
