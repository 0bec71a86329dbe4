"""What every benchmark shares: options, clocks, one side of a comparison, and the runner that lets the sides take
turns.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, Protocol

import psutil
import typer

Seed = Annotated[int, typer.Option(min=0)]
Repetitions = Annotated[int, typer.Option(min=1, help="Measurements of each side, which take turns.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Model in Hugging Face format; by default a small random one.", show_default=False)
]

Clock = Literal["wall_s", "cpu_s"]
"""cpu_s is the time of the measuring process, which a busy machine disturbs less."""


@dataclass(frozen=True)
class Timed:
    """An amount of work (rows, tokens, bytes) and the seconds that it took.

    cpu_s: not a number where other processes did the work.
    """

    amount: float
    wall_s: float
    cpu_s: float = float("nan")

    def __add__(self, other: Timed) -> Timed:
        return Timed(self.amount + other.amount, self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def rate(self, clock: Clock = "wall_s") -> float:
        """Amount per second."""
        return self.amount / (self.wall_s if clock == "wall_s" else self.cpu_s)


@dataclass
class Stopwatch:
    """Adds up pieces of work by name."""

    timed: dict[str, Timed] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str, amount: float) -> Iterator[None]:
        """Count what is done inside as `amount` of the work `name`."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        yield
        piece = Timed(amount, time.perf_counter() - wall_s, time.process_time() - cpu_s)
        self.timed[name] = self.timed.get(name, Timed(0, 0.0, 0.0)) + piece


class Backend(Protocol):
    """One side of a comparison: this system, or what it is compared with."""

    def __call__(self) -> Mapping[str, Timed]:
        """Do the work once. Gives what was done, by name, and how long it took."""
        ...


@dataclass(frozen=True)
class Results:
    """What the backends measured: by backend one entry per repetition; the repetitions of all belong together."""

    found: Mapping[str, Sequence[Mapping[str, Timed]]]

    def rates(self, backend: str, work: str, clock: Clock = "wall_s") -> list[float]:
        """Amount per second, of each repetition."""
        return [each[work].rate(clock) for each in self.found[backend]]

    def medians(self, work: str, clock: Clock = "wall_s") -> dict[str, float]:
        """Median amount per second of each backend."""
        return {backend: median(self.rates(backend, work, clock)) for backend in self.found}

    def ratios(self, ours: str, theirs: str, work: str, clock: Clock = "wall_s") -> list[float]:
        """Rate of `ours` over that of `theirs`, of each repetition."""
        both = zip(self.rates(ours, work, clock), self.rates(theirs, work, clock), strict=True)
        return [mine / other for mine, other in both]


def measure_in_turn(backends: Mapping[str, Backend], repetitions: int, warm_ups: int = 0) -> Results:
    """Let every backend do its work `repetitions` times. They take turns, and never work at the same time.

    warm_ups: rounds before, which do not count.
    """
    found: dict[str, list[Mapping[str, Timed]]] = {name: [] for name in backends}
    for turn in range(-warm_ups, repetitions):
        # Who goes first alternates, so that a drift of the machine favors nobody.
        for name in backends if turn % 2 == 0 else reversed(list(backends)):
            timed = backends[name]()
            if turn >= 0:
                found[name].append(timed)
    return Results(found)


def run_module(module: str, *arguments: object, timeout_s: float) -> object:
    """The JSON that a module of this package prints, in a process of its own, so that its memory is its alone.

    Raises:
        RuntimeError: the process failed. TimeoutError: it did not end in time.
    """
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{' '.join(command)} did not end within {timeout_s:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}")
    printed: object = json.loads(done.stdout)
    return printed


def circumstances(**known: object) -> dict[str, object]:
    """What every result says of itself, beside what is `known` of its measurement."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    hardware = {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    return {**known, "hardware": hardware, "command": " ".join(["python -m tests.benchmarks", *sys.argv[1:]])}
