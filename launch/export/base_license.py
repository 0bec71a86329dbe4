"""The licence of the model that training started from, where it can be found out."""

from __future__ import annotations

from pathlib import Path

import yaml

from learner.settings.model import PretrainedModelSettings

CARD_FILE = "README.md"


def base_license(settings: PretrainedModelSettings) -> str | None:
    """SPDX identifier (as the Hugging Face hub writes it) in the base model's card or GGUF file; None if there is none.

    The card of a hub name is asked of the hub; without a connection it counts as not found.

    Raises:
        ValueError: the model names a package that is not installed.
    """
    from learner.model.policy import locate_model

    source = locate_model(settings)
    if source.gguf_file is not None:
        return _of_gguf(Path(source.name) / source.gguf_file)
    if Path(source.name).is_dir():
        return _of_card(Path(source.name) / CARD_FILE)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return _of_card(Path(hf_hub_download(source.name, CARD_FILE, revision=source.revision)))
    except (OSError, HFValidationError):  # no connection, no card, or a folder that is no longer there
        return None


def _of_gguf(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    return None if field is None else str(field.contents())


def _of_card(file: Path) -> str | None:
    if not file.is_file():
        return None
    _, mark, rest = file.read_text(encoding="utf-8").partition("---\n")
    front_matter, end, _ = rest.partition("\n---")
    if not mark or not end:
        return None
    try:
        fields = yaml.safe_load(front_matter)
    except yaml.YAMLError:
        return None
    found = fields.get("license") if isinstance(fields, dict) else None
    return None if found is None else str(found)
