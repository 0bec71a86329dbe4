"""The commands that run recipes as jobs of a Ray cluster: `sequencematch submit` and `sequencematch jobs ...`."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.command_errors import reported_errors, setting_up, stdout_kept_clean
from launch.command_options import AsJson, path, split_overrides
from launch.errors import EXIT_USER_ERROR, UserError
from launch.stop_signals import stop_exit_code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launch.jobs.server import Job, JobServer
    from launch.settings.run import RunSettings

jobs_app = typer.Typer(no_args_is_help=True, help="Look after the runs that were submitted to a Ray cluster.")

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="http://HEAD:8265",
        help="Job server of the cluster: the dashboard of its head node.",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run, or a submission id.")]


def submit(
    address: Address,
    recipe: Annotated[str | None, typer.Argument(help="YAML recipe, of this machine. Not with --resume.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: KEY=VALUE, as for train.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of run and job; by default the recipe's name with date and time.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with this run folder, a path of the cluster.")
    ] = None,
    resume_if_exists: Annotated[
        bool,
        typer.Option(
            "--resume-if-exists", help="Start the run that --name names, or go on with it if the cluster has had it."
        ),
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=VALUE]", help="Variable for the run's processes; without value, the one set here."),
    ] = None,
    evaluate_after: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure the trained models at the end.")
    ] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log, and end as the run ends.")] = True,
) -> None:
    """Run a recipe as a job of a Ray cluster: train, somewhere else.

    The recipe is checked here; this version of the program and the resolved recipe are sent. Paths in the recipe are
    those of the cluster's nodes, and runs_folder has to be one that they share.

    [dim]Example:[/dim] sequencematch submit --address http://HEAD:8265 launch/recipes/arithmetic_cpu.yaml
    runs_folder=/shared/runs actors.count=4

    Ctrl-C ends the following only; the run goes on. Exit code: that of the run, as from train.
    """
    with reported_errors():
        if resume_if_exists and name is None:
            raise UserError("--resume-if-exists finds the run by its name: give --name NAME too")
        recipe, changed = split_overrides(recipe, overrides or [], resume)
        settings, run = _what_to_run(recipe, changed, name, resume)
        environment = _variables(env or [])
        from launch.jobs.server import JobServer
        from launch.jobs.tree import RECIPE_FILE, write_job_tree

        server = JobServer(address)
        submission_id = choose_submission_id(server.find(run), run, resuming=resume is not None or resume_if_exists)
        arguments = [RECIPE_FILE, "--name", run] if resume is None else ["--resume", str(resume), *changed]
        if resume_if_exists:
            arguments.append("--resume-if-exists")
        if not evaluate_after:
            arguments.append("--no-evaluate")
        with tempfile.TemporaryDirectory(prefix="sequencematch-job-") as folder:
            with setting_up():
                write_job_tree(Path(folder), settings)
            command = shlex.join(["python", "-m", "launch.train", *arguments])
            job = server.submit(run, submission_id, command, Path(folder), environment)
        typer.echo(f"submitted {run} to {server.address}", err=True)
        if wait:
            _follow(server, job)
        else:
            _say_how_to_look(server, run)


@jobs_app.command("list")
def list_jobs(address: Address, as_json: AsJson = False) -> None:
    """List the jobs that a cluster remembers.

    [dim]Example:[/dim] sequencematch jobs list --address http://HEAD:8265
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.jobs.server import JobServer
        from launch.jobs.view import job_table

        found = JobServer(address).jobs()
        if not as_json:
            Console().print(job_table(found))
    if as_json:
        typer.echo(json.dumps([job.to_json() for job in found]))


@jobs_app.command("status")
def job_status(run: RunName, address: Address, as_json: AsJson = False) -> None:
    """Say how a submitted run stands.

    [dim]Example:[/dim] sequencematch jobs status NAME --address http://HEAD:8265
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.jobs.server import JobServer
        from launch.jobs.view import describe_job

        job = JobServer(address).get(run)
        if not as_json:
            typer.echo(describe_job(job))
    if as_json:
        typer.echo(json.dumps(job.to_json()))


@jobs_app.command("logs")
def job_logs(
    run: RunName,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends, and end as it ends.")] = False,
) -> None:
    """Print what a submitted run has printed.

    [dim]Example:[/dim] sequencematch jobs logs NAME --follow --address http://HEAD:8265
    """
    with reported_errors():
        from launch.jobs.server import JobServer

        server = JobServer(address)
        job = server.get(run)
        if follow:
            _follow(server, job)
        else:
            typer.echo(server.log(job), nl=False)


@jobs_app.command("stop")
def stop_job(run: RunName, address: Address) -> None:
    """End a submitted run after its current step, with a checkpoint, and wait until it has ended.

    [dim]Example:[/dim] sequencematch jobs stop NAME --address http://HEAD:8265
    """
    with reported_errors():
        from launch.jobs.server import JobServer
        from launch.jobs.view import describe_job

        server = JobServer(address)
        job = server.get(run)
        if job.ended:
            raise UserError(f"there is nothing to stop: {describe_job(job)}")
        with _interruption_explained(server, job.run, "no longer waiting; the run has been told to end"):
            typer.echo(describe_job(server.stop(job)))


def _what_to_run(
    recipe: str | None, overrides: Sequence[str], name: str | None, resume: Path | None
) -> tuple[RunSettings | None, str]:
    """The settings to send (None: the cluster has them) and the name of the run."""
    from launch.run_folder.folder import check_outlives_job, check_run_name, new_run_name
    from launch.settings.recipe import read_recipe

    if resume is not None:
        if name is not None:
            raise UserError(f"--name is for a new run; {resume} keeps the name it has")
        if not resume.is_absolute():
            raise UserError(f"--resume {resume} is relative: give the path that the run has on the cluster's nodes")
        return None, check_run_name(resume.name)
    assert recipe is not None
    with setting_up():
        settings = read_recipe(path(recipe), overrides)
    check_outlives_job(settings)
    return settings, check_run_name(new_run_name(settings) if name is None else name)


def _variables(given: Sequence[str]) -> dict[str, str]:
    variables = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or (not equals and key not in os.environ):
            raise UserError(f"--env {one}: that variable is not set here; give KEY=VALUE")
        variables[key] = value if equals else os.environ[key]
    return variables


def choose_submission_id(before: Job | None, run: str, *, resuming: bool) -> str:
    """What the cluster will know the submission by: the name of the run, or where it has had that, with the time.

    before: the newest job of the run.

    Raises:
        UserError: the run is on the cluster now; or it has been there, and this is no resumption.
    """
    if before is None and not resuming:
        return run
    if before is not None and not before.ended:
        raise UserError(
            f"run {run} is on that cluster already ({before.state}): look with `sequencematch jobs logs {run} "
            f"--follow`, end it with `sequencematch jobs stop {run}`, or choose another --name"
        )
    if before is not None and not resuming and before.exit_code != EXIT_USER_ERROR:  # that one may be mended
        raise UserError(
            f"that cluster has had a run {run} ({before.state}): choose another --name, or go on with --resume RUN or "
            "--resume-if-exists"
        )
    return f"{run}-{time.strftime('%Y%m%d-%H%M%S')}"


def _follow(server: JobServer, job: Job) -> None:
    with _interruption_explained(server, job.run, "no longer following; the run goes on"):
        ended = server.follow(job, lambda text: typer.echo(text, nl=False))
    from launch.jobs.view import describe_job

    typer.echo(describe_job(ended), err=True)
    if ended.command_exit_code:
        raise typer.Exit(ended.command_exit_code)


@contextmanager
def _interruption_explained(server: JobServer, run: str, what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\n{what}", err=True)
        _say_how_to_look(server, run)
        raise typer.Exit(stop_exit_code()) from None


def _say_how_to_look(server: JobServer, run: str) -> None:
    typer.echo(
        f"look:  sequencematch jobs logs {run} --follow --address {server.address}\n"
        f"end:   sequencematch jobs stop {run} --address {server.address}",
        err=True,
    )
