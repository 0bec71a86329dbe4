"""A process for engines: vLLM binds threads, seeds torch and must not live in the process of the tests.

`in_engine_process(function, ...)` runs a module-level function there and returns its result. All tests of a
session share the process, one engine at a time; a function that answers too late (a livelock in the engine is
a known way to fail) or dies takes the process with it, and the next call starts another.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from actors.engine.interface import EngineSettings, FinishedRollout, engine_environment
from actors.settings import ActorsSettings
from buffer.trajectory.schema import TokenContract
from tests.integration.traffic import Request
from tests.tiny_models import CONTRACT

if TYPE_CHECKING:
    from actors.engine.engine import BackspaceEngine

P = ParamSpec("P")
R = TypeVar("R")
START_ALLOWANCE_S = 120.0  # vLLM's import alone takes 5 to 15 s


class EngineProcessFailed(AssertionError):
    """The function raised in the engine process, or the process died or fell silent."""


@dataclass
class _Host:
    process: multiprocessing.process.BaseProcess
    connection: multiprocessing.connection.Connection


_host: _Host | None = None


def in_engine_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `function` in the engine process; it has 60 s, and the start of the process comes on top."""
    return in_engine_process_for(60.0, function, *args, **kwargs)


def in_engine_process_for(timeout_s: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `function` in the engine process within `timeout_s` seconds."""
    global _host  # noqa: PLW0603
    if _host is None:
        _host = _start()
        timeout_s += START_ALLOWANCE_S
    host = _host
    host.connection.send((function, args, kwargs))
    if not host.connection.poll(timeout_s):
        _stop()
        raise EngineProcessFailed(f"{function.__name__} did not return from the engine within {timeout_s:.0f} s")
    try:
        succeeded, result = host.connection.recv()
    except EOFError:
        _stop()
        raise EngineProcessFailed(f"the engine process died in {function.__name__}") from None
    if not succeeded:
        raise EngineProcessFailed(result)
    return result


def _start() -> _Host:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Host(process, ours)


def _stop() -> None:
    global _host  # noqa: PLW0603
    assert _host is not None
    _host.process.kill()
    _host.process.join(timeout=30)
    _host = None


def _serve(connection: multiprocessing.connection.Connection) -> None:
    os.environ.update(engine_environment())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*args, **kwargs)))
        except Exception:  # noqa: BLE001  # whatever happened belongs to the test on the other side
            close_engine()
            connection.send((False, traceback.format_exc()))


def small_engine(folder: Path | str, **changes: object) -> EngineSettings:
    """For the tiny models. changes: of the engine's settings, or of the actors' settings in it."""
    actors = {name: changes.pop(name) for name in ActorsSettings.model_fields if name in changes}
    return EngineSettings(
        str(folder),
        max_length=256,
        actors=ActorsSettings.model_validate({"max_concurrent": 16, "kv_cache_gib": 1 / 32, **actors}),
        **{"max_batched_tokens": 48, **changes},
    )


def answer(engine: BackspaceEngine, requests: Sequence[Request] = ()) -> list[FinishedRollout]:
    """What the engine makes of these requests, and of those that it has already."""
    for request in requests:
        engine.add(request.request_id, request.prompt_ids, request.sampling)
    trajectories = []
    while engine.num_unfinished:
        trajectories += engine.step()
    return trajectories


def message_of(attempt: Callable[[], object]) -> str:
    """The error that it raises."""
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


_engine: BackspaceEngine | None = None


def fresh_engine(
    settings: EngineSettings, engine_class: type[BackspaceEngine] | None = None, contract: TokenContract = CONTRACT
) -> BackspaceEngine:
    """Inside the engine process: end the engine of the test before and start one for the tiny models' ids."""
    global _engine  # noqa: PLW0603
    from actors.engine.engine import BackspaceEngine

    close_engine()
    _engine = (engine_class or BackspaceEngine)(settings, contract)
    return _engine


def shared_engine(settings: EngineSettings, contract: TokenContract = CONTRACT) -> BackspaceEngine:
    """Like `fresh_engine`, but keeps the engine of the test before where it is idle and is such a one."""
    if (
        _engine is not None
        and (_engine.settings, _engine.contract) == (settings, contract)
        and _engine.version == _engine.num_unfinished == 0
    ):
        return _engine
    return fresh_engine(settings, contract=contract)


def close_engine() -> None:
    """Inside the engine process: end the current engine and free its memory."""
    global _engine  # noqa: PLW0603
    if _engine is not None:
        _engine.shutdown()
        _engine = None
        gc.collect()
