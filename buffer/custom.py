"""The user's own objectives, tasks, scorers and samplers: `{name: custom, path: MODULE:CLASS, options: {...}}`.

A recipe can come from a stranger, so its classes are loaded only where the environment names their modules. Whoever
reads settings from a file calls `check_trusted`; the processes of a run get settings that its driver has checked.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from buffer.settings import CustomSettings

TRUSTED_MODULES = "SEQUENCEMATCH_TRUSTED_MODULES"
"""Environment variable with the names of modules, separated by commas."""

T = TypeVar("T")


def check_trusted(settings: CustomSettings, key: str) -> None:
    """ValueError where the environment does not name the module of the class. key: of the setting, for the message."""
    if settings.module not in {name.strip() for name in os.environ.get(TRUSTED_MODULES, "").split(",")}:
        trust = f"{TRUSTED_MODULES}={settings.module}"
        raise ValueError(
            f"{key} of the recipe runs code, class {settings.path}. Read it, and if you trust it say so with {trust} "
            f"in the environment (`submit`: --env {trust})"
        )


def custom_class(settings: CustomSettings, kind: type[T]) -> type[T]:
    """The class that is named. ValueError: it cannot be imported, or is no class with the methods of `kind`."""
    name = settings.path.partition(":")[2]
    try:
        found = getattr(importlib.import_module(settings.module), name, None)
    except ImportError as error:
        raise ValueError(
            f"{settings.path} cannot be imported ({error}): install its module on every node of the run, or put its "
            "folder on PYTHONPATH"
        ) from error
    if found is None:
        raise ValueError(f"module {settings.module} has no class {name}: correct `path`, which is MODULE:CLASS")
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ValueError(f"{settings.path} is not a class with the methods of {kind.__module__}.{kind.__name__}")
    return found


def custom_options(settings: CustomSettings, found: type) -> BaseModel | None:
    """The options as an instance of `found.Options`, a pydantic model; None where the class has no such attribute.
    ValueError: the class does not accept them.
    """
    options: type[BaseModel] | None = getattr(found, "Options", None)
    if options is None and settings.options:
        raise ValueError(f"{settings.path} takes no options (it has no class `Options`): leave options out")
    try:
        return None if options is None else options.model_validate(settings.options)
    except ValidationError as error:
        wrong = [f"{'.'.join(('options', *map(str, each['loc'])))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"{settings.path}: {'; '.join(wrong).replace('Value error, ', '')}") from None


def make_custom(settings: CustomSettings, kind: type[T]) -> T:
    """An instance, made from its options where it has any. ValueError: as `custom_class` and `custom_options`, or the
    constructor does not accept them.
    """
    found = custom_class(settings, kind)
    options, make = custom_options(settings, found), cast(Callable[..., T], found)
    try:
        return make() if options is None else make(options)
    except ValueError as error:
        raise ValueError(f"{settings.path}: {error}") from error
