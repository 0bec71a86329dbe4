"""Runs as jobs of a Ray cluster: submitting, finding by the name of the run, following, stopping.

Speaks to the job server of the head node (its dashboard, port 8265) over HTTP, through Ray's own client:
https://docs.ray.io/en/latest/cluster/running-applications/job-submission/sdk.html
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from launch.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, RunFailedError, UserError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REQUEST_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 240
"""What a run is given to end after its current step, with a checkpoint, before the cluster kills it."""
ENDING_TIMEOUT_S = 30.0
"""Between the end of a job and of its log, and between the death of a stopped one and the news of it."""
POLL_S = 0.5

# Ray tells of every package and connection, between the lines of the run.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_RUN_KEY = "sequencematch_run"


@dataclass(frozen=True)
class Job:
    """One submission. Times in seconds since the epoch; exit_code: None until it ended, or where nothing ran."""

    run: str
    submission_id: str
    state: JobStatus
    started_at: float | None
    ended_at: float | None
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return bool(self.state.is_terminal())

    @property
    def command_exit_code(self) -> int:
        """The exit code of a command that followed the job to its end: as `train` would give it here."""
        if self.state == JobStatus.SUCCEEDED:
            return 0
        if self.state == JobStatus.STOPPED:
            return EXIT_STOPPED
        own = (EXIT_RUN_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_STOPPED)
        return self.exit_code if self.exit_code in own else EXIT_RUN_FAILED

    def to_json(self) -> dict[str, object]:
        """All that is known."""
        return {
            "run": self.run,
            "submission_id": self.submission_id,
            "state": str(self.state),
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "exit_code": self.exit_code,
            "message": self.message,
        }


class JobServer:
    """The job server of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect. address: `http://HEAD:8265`.

        Raises:
            UserError: nothing answers there, or something else; or it asks for a token that is not given.
        """
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"{address!r} (--address, or {_ADDRESS_VARIABLE}) is not of the form http://HEAD:8265, the dashboard "
                "of the head node"
            )
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address.rstrip("/")
        os.environ[_ADDRESS_VARIABLE] = self.address  # Ray lets this and RAY_ADDRESS override what its client is told
        with self._reported():
            try:
                self._client = _ImpatientClient(self.address)
            except (RuntimeError, ValueError, KeyError, requests.HTTPError) as error:
                raise UserError(
                    f"what answers at {self.address} is no Ray job server ({error}): give the address of the head "
                    "node's dashboard, http://HEAD:8265"
                ) from None

    def jobs(self) -> list[Job]:
        """All jobs that the cluster remembers, in the order of submission; of others than us too."""
        with self._reported():
            details = self._client.list_jobs()
        found = [_as_job(one) for one in details if one.submission_id is not None]
        return sorted(found, key=lambda job: job.started_at or 0.0)

    def find(self, run: str) -> Job | None:
        """The newest job of a run, or the job of that submission id; None if there is none."""
        found = [job for job in self.jobs() if run in (job.run, job.submission_id)]
        return found[-1] if found else None

    def get(self, run: str) -> Job:
        """Like `find`.

        Raises:
            UserError: there is none.
        """
        job = self.find(run)
        if job is None:
            raise UserError(
                f"the cluster at {self.address} knows no run {run!r}; `sequencematch jobs list` shows those it knows"
            )
        return job

    def submit(self, run: str, submission_id: str, command: str, tree: Path, environment: Mapping[str, str]) -> Job:
        """Send a tree and start a command in it. environment: variables of every process of the run.

        Raises:
            UserError: the server refuses the job.
        """
        runtime_env = {
            "working_dir": str(tree),
            "env_vars": {**environment, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_S)},
        }
        with self._reported():
            try:
                self._client.submit_job(
                    entrypoint=command, submission_id=submission_id, runtime_env=runtime_env, metadata={_RUN_KEY: run}
                )
            except (RuntimeError, ValueError) as error:
                raise UserError(f"the job server at {self.address} refused {run}: {error}") from None
        return self.get(submission_id)

    def stop(self, job: Job, timeout_s: float = STOP_TIMEOUT_S + ENDING_TIMEOUT_S) -> Job:
        """Ask a job to end, and wait until it has: after its current step, with a checkpoint.

        Raises:
            RunFailedError: it still runs after `timeout_s`.
        """
        with self._reported():
            self._client.stop_job(job.submission_id)
        deadline = time.monotonic() + timeout_s
        while not (job := self.get(job.submission_id)).ended:
            if time.monotonic() > deadline:
                raise RunFailedError(f"run {job.run} did not end within {timeout_s:.0f} s of being asked to")
            time.sleep(POLL_S)
        return job

    def log(self, job: Job) -> str:
        """What the job has printed so far."""
        with self._reported():
            text: str = self._client.get_job_logs(job.submission_id)
        return text

    def follow(self, job: Job, show: Callable[[str], None]) -> Job:
        """Pass on what the job prints, from its beginning, until it ends; gives the job as it ended.

        Raises:
            RunFailedError: the connection to the cluster is lost, or its log has no end. The job may go on.
        """
        try:
            return asyncio.run(self._follow(job, show))
        except (aiohttp.ClientError, OSError, RuntimeError, UserError) as error:  # Ray's own are RuntimeErrors
            raise RunFailedError(
                f"lost the log of run {job.run}, which may go on ({str(error) or type(error).__name__}): look again "
                f"with `sequencematch jobs status {job.run} --address {self.address}`"
            ) from None

    async def _follow(self, job: Job, show: Callable[[str], None]) -> Job:
        """The log ends after the job; while it is silent, the server is asked whether the job still runs."""
        log: AsyncIterator[str] = self._client.tail_job_logs(job.submission_id)
        ended_since: float | None = None
        while True:
            chunk = asyncio.ensure_future(anext(log, None))
            while not (await asyncio.wait({chunk}, timeout=REQUEST_TIMEOUT_S / 4))[0]:
                now = await asyncio.to_thread(self.get, job.submission_id)
                if now.ended:
                    ended_since = ended_since or time.monotonic()
                    if time.monotonic() - ended_since > ENDING_TIMEOUT_S:
                        chunk.cancel()
                        return now
            text = chunk.result()
            if text is None:
                break
            show(text)
        return await asyncio.to_thread(self._wait_for_state, job)

    def _wait_for_state(self, job: Job) -> Job:
        """The log may end a moment before the state is known."""
        deadline = time.monotonic() + ENDING_TIMEOUT_S
        while not (now := self.get(job.submission_id)).ended:
            if time.monotonic() > deadline:
                raise RunFailedError(
                    f"the log of run {job.run} ended, but not the run: look again with "
                    f"`sequencematch jobs status {job.run} --address {self.address}`"
                )
            time.sleep(POLL_S)
        return now

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Around every request."""
        try:
            yield
        except AuthenticationError as error:
            given = "refuses the token given" if "failed" in str(error).splitlines()[0] else "asks for a token"
            raise UserError(
                f"the job server at {self.address} {given}: put the cluster's into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        except (ConnectionError, requests.ConnectionError):
            raise UserError(
                f"no Ray job server answers at {self.address}: check --address or {_ADDRESS_VARIABLE} (the head node's "
                "dashboard, http://HEAD:8265), and that the head was started with its dashboard"
            ) from None
        except requests.Timeout:
            raise UserError(
                f"the job server at {self.address} did not answer within {REQUEST_TIMEOUT_S:.0f} s: look at the head "
                "node's dashboard logs"
            ) from None


class _ImpatientClient(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client waits for an answer for ever."""

    def _do_request(self, method: str, endpoint: str, **arguments: object) -> requests.Response:
        answer: requests.Response = super()._do_request(method, endpoint, timeout=REQUEST_TIMEOUT_S, **arguments)
        return answer


def _as_job(details: JobDetails) -> Job:
    submission_id = str(details.submission_id)
    return Job(
        run=(details.metadata or {}).get(_RUN_KEY, submission_id),
        submission_id=submission_id,
        state=JobStatus(details.status),
        started_at=_seconds(details.start_time),
        ended_at=_seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=(details.message or "").strip(),
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
