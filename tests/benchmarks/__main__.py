"""Run one benchmark: `python -m tests.benchmarks NAME [OPTIONS] [--json]`, from the root of the repository.

Each is a module of this package: `bench` measures and returns a JSON object, its parameters are the options; `SHOWN`
says what of that object people see. With `--json` the object is printed on stdout, and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from launch.commands import reported_errors, stdout_kept_clean
from launch.errors import EXIT_USER_ERROR
from tests.benchmarks.table import Shown, print_result

NAMES = ("rollouts", "buffer", "learner", "learner_memory", "weights", "scaling")

P = ParamSpec("P")


def main(arguments: list[str]) -> None:
    """Run the benchmark that the first argument names with the options that follow."""
    as_json = "--json" in arguments
    name, *options = [argument for argument in arguments if argument != "--json"] or [""]
    if name not in NAMES:
        print(f"error: there is no benchmark {name!r}: choose one of {', '.join(NAMES)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    module = importlib.import_module(f"tests.benchmarks.{name}")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_reporting(module.bench, module.SHOWN, as_json))
    app(options, prog_name=f"python -m tests.benchmarks {name}")


def _reporting(bench: Callable[P, dict[str, object]], shown: Shown, as_json: bool) -> Callable[P, None]:
    @functools.wraps(bench)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with reported_errors(), stdout_kept_clean(as_json):
            found = bench(*args, **kwargs)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            print_result(found, shown)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
