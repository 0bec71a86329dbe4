"""Submitting a run as a job of a Ray cluster: the checks before, what is sent, and following the job to its end.

Speaks to the job server of the head node (its dashboard, port 8265) over HTTP, through Ray's own client:
https://docs.ray.io/en/latest/cluster/running-applications/job-submission/sdk.html
`ray job list|status|logs|stop` look after what was submitted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import requests
import typer
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import launch
from launch.commands import path
from launch.errors import (
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    RunFailedError,
    UserError,
    setting_up,
)
from launch.run_folder.folder import check_outlives_job, check_run_name, new_run_name
from launch.settings.recipe import read_recipe, write_recipe
from launch.settings.run import RunSettings
from launch.stop_signals import stop_exit_code

REQUEST_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 240
"""How long a job that is told to stop may take for its current step and a checkpoint, before Ray kills it."""
ENDING_TIMEOUT_S = 30.0
"""Longest time between the end of a job's log and the news of its end."""
SILENCE_S = 15.0
"""After this time without output the server is asked whether the job still runs."""

PACKAGES = ("actors", "buffer", "launch", "learner")
RECIPE_FILE = "recipe.yaml"

_RUN_KEY = "sequencematch_run"
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
# These log every package and connection between the lines of the run.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def submit_run(
    address: str,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    name: str | None,
    resume: Path | None,
    resume_if_exists: bool,
    variables: Sequence[str],
    evaluate_after: bool,
    wait: bool,
) -> int:
    """Check a run here, send it to the job server at `address` (`http://HEAD:8265`), and follow its log if `wait`.

    Gives the exit code of the command. The other arguments are the options of `sequencematch submit`.

    Raises:
        UserError: the run is refused here; no job server answers; or it refuses the job.
        RunFailedError: the log is lost.
    """
    settings = None  # of a run to resume: the cluster has them
    if resume is not None:
        if not resume.is_absolute():
            raise UserError(f"--resume {resume} is relative: give the path that the run has on the cluster's nodes")
        run = check_run_name(resume.name)
    else:
        assert recipe is not None
        with setting_up():
            settings = read_recipe(path(recipe), overrides)
        check_outlives_job(settings)
        run = check_run_name(new_run_name(settings) if name is None else name)
    environment = dict(_variable(each) for each in variables)
    arguments = [RECIPE_FILE, "--name", run] if resume is None else ["--resume", str(resume), *overrides]
    arguments += ["--resume-if-exists"] * resume_if_exists + ["--no-evaluate"] * (not evaluate_after)
    address = address.rstrip("/")
    with _server_errors(address), tempfile.TemporaryDirectory(prefix="sequencematch-job-") as folder:
        client = _connect(address)
        before = find_job(client.list_jobs(), run)
        submission_id = choose_submission_id(before, run, address, resuming=resume is not None or resume_if_exists)
        with setting_up():
            write_job_tree(Path(folder), settings)
        client.submit_job(
            entrypoint=shlex.join(["python", "-m", "launch.cli", "train", *arguments]),
            submission_id=submission_id,
            runtime_env={
                "working_dir": folder,
                "env_vars": {**environment, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_S)},
            },
            metadata={_RUN_KEY: run},
        )
    typer.echo(f"submitted {run} to {address}: job {submission_id}", err=True)
    how_to_look = _how_to_look(submission_id, address)
    if not wait:
        typer.echo(how_to_look, err=True)
        return 0
    try:
        ended = _follow(client, submission_id, address)
    except KeyboardInterrupt:
        typer.echo(f"\nno longer following; the run goes on\n{how_to_look}", err=True)
        return stop_exit_code()
    typer.echo(describe_job(ended), err=True)
    return exit_code_of(ended)


def write_job_tree(folder: Path, settings: RunSettings | None) -> None:
    """Fill an empty folder with our packages as installed here, and a `recipe.yaml` of the settings, if any."""
    source = Path(launch.__file__).parents[1]
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source / package, folder / package, ignore=ignored)
    if settings is not None:
        write_recipe(settings, folder / RECIPE_FILE)


def find_job(jobs: Sequence[JobDetails], run: str) -> JobDetails | None:
    """The newest job of a run, or of that submission id; None if there is none."""
    found = [job for job in jobs if job.submission_id is not None and run in (_run_of(job), job.submission_id)]
    return max(found, key=lambda job: job.start_time or 0, default=None)


def choose_submission_id(before: JobDetails | None, run: str, address: str, *, resuming: bool) -> str:
    """What the cluster will know the submission by: the name of the run, or where it has had that, with the time.

    before: the newest job of the run. UserError: that one goes on, or it has been there, and this is no resumption.
    """
    if before is None and not resuming:
        return run
    if before is not None and not before.status.is_terminal():
        raise UserError(
            f"run {run} is on that cluster already ({before.status}): {_how_to_look(before.submission_id, address)}, "
            "or choose another --name"
        )
    # A start that was refused may have been mended.
    if before is not None and not resuming and before.driver_exit_code != EXIT_USER_ERROR:
        raise UserError(
            f"that cluster has had a run {run} ({before.status}): choose another --name, or go on with --resume RUN or "
            "--resume-if-exists"
        )
    return f"{run}-{time.strftime('%Y%m%d-%H%M%S')}"


def exit_code_of(job: JobDetails) -> int:
    """The exit code of a command that followed the job to its end: as `train` would give it here."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return EXIT_STOPPED
    own = (EXIT_RUN_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_STOPPED)
    return job.driver_exit_code if job.driver_exit_code in own else EXIT_RUN_FAILED


def describe_job(job: JobDetails) -> str:
    """One line about a job that has ended; with Ray's reason where no process of the run could print its own."""
    code = None if job.driver_exit_code is None else f"exit code {job.driver_exit_code}"
    return f"run {_run_of(job)}: {job.status}, {code or ' '.join((job.message or '').split())}"


class _ImpatientClient(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client waits for an answer without a time limit."""

    def _do_request(self, method: str, endpoint: str, **arguments: object) -> requests.Response:
        answer: requests.Response = super()._do_request(method, endpoint, timeout=REQUEST_TIMEOUT_S, **arguments)
        return answer


def _connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"{address!r} (--address, or {_ADDRESS_VARIABLE}) is not of the form http://HEAD:8265, the dashboard "
            "of the head node"
        )
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ[_ADDRESS_VARIABLE] = address  # Ray lets this and RAY_ADDRESS override the address given to its client
    return _ImpatientClient(address)


@contextmanager
def _server_errors(address: str) -> Iterator[None]:
    """Around requests: what they raise becomes a UserError that names the address."""
    try:
        yield
    except AuthenticationError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the job server at {address} wants another token ({reason}): put the cluster's into ~/.ray/auth_token or "
            "RAY_AUTH_TOKEN"
        ) from None
    except (ConnectionError, requests.ConnectionError, requests.Timeout):
        raise UserError(
            f"no Ray job server answers at {address} (within {REQUEST_TIMEOUT_S:.0f} s): check --address or "
            f"{_ADDRESS_VARIABLE} (the head node's dashboard, http://HEAD:8265), and that the dashboard runs there"
        ) from None
    except (RuntimeError, ValueError, KeyError, requests.HTTPError) as error:
        raise UserError(
            f"the job server at {address} refused the run ({error}); --address is that of the head node's dashboard, "
            "http://HEAD:8265"
        ) from None


def _follow(client: JobSubmissionClient, submission_id: str, address: str) -> JobDetails:
    """Print what the job prints until it ends; gives the job as it ended. RunFailedError if the cluster is lost."""
    try:
        asyncio.run(_print_log(client, submission_id))
        deadline = time.monotonic() + ENDING_TIMEOUT_S
        while not (job := client.get_job_info(submission_id)).status.is_terminal():
            if time.monotonic() > deadline:
                raise TimeoutError("the log ended, but not the run")
            time.sleep(0.5)
    except (aiohttp.ClientError, AuthenticationError, OSError, RuntimeError) as error:  # Ray's own are RuntimeErrors
        raise RunFailedError(
            f"lost the log of run {submission_id}, which may go on ({str(error) or type(error).__name__}): look again "
            f"with `ray job status {submission_id} --address {address}`"
        ) from None
    return job


async def _print_log(client: JobSubmissionClient, submission_id: str) -> None:
    """The log ends after the job; while it is silent, the server is asked whether the job still runs."""
    log = client.tail_job_logs(submission_id)
    ended = False
    while True:
        chunk = asyncio.ensure_future(anext(log, None))
        while not (await asyncio.wait({chunk}, timeout=SILENCE_S))[0]:
            if ended:
                chunk.cancel()
                return
            ended = (await asyncio.to_thread(client.get_job_info, submission_id)).status.is_terminal()
        text = chunk.result()
        if text is None:
            return
        typer.echo(text, nl=False)


def _how_to_look(submission_id: str | None, address: str) -> str:
    return (
        f"look with `ray job logs {submission_id} --follow --address {address}`, end it with "
        f"`ray job stop {submission_id} --address {address}`"
    )


def _run_of(job: JobDetails) -> str:
    return str((job.metadata or {}).get(_RUN_KEY, job.submission_id))


def _variable(given: str) -> tuple[str, str]:
    key, equals, value = given.partition("=")
    if not key or (not equals and key not in os.environ):
        raise UserError(f"--env {given}: that variable is not set here; give KEY=VALUE")
    return key, value if equals else os.environ[key]
