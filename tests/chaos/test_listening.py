"""What a run opens to the network: nothing; and from this machine it can be reached."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import psutil
import pytest

from launch.run.control import catalog_image, run_status
from launch.run_folder.folder import BUFFER_FOLDER
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, metrics_of


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_with_actors_listens_on_loopback_only(tmp_path: Path) -> None:
    """Ray, the learner, the buffer with its Flight endpoint, and the engine."""
    with TrainProcess(
        tmp_path,
        ARITHMETIC,
        *TINY,
        "stages.sequencematch.steps=100000",
        "buffer.flight.enabled=true",
    ) as run:
        run.wait_until(lambda: run.step("sequencematch") > 0, 300.0, "the first step with rollouts")
        processes = run.processes()
        open_to_all = {
            (process.name(), connection.laddr.ip)
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and not _is_loopback(connection.laddr.ip)
        }
        assert open_to_all == set()
        status = run_status(run.folder)  # from another process of this machine all of it is within reach
        assert status.learner.stage == "sequencematch"
        assert status.pool is not None
        assert status.buffer is not None
        image = catalog_image(run.folder, run.folder / BUFFER_FOLDER / "shard-000")
        assert image.startswith(b"SQLite format 3\0")
        run.terminate()
        run.wait(120.0)
    assert metrics_of(run.folder, "sequencematch")


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
