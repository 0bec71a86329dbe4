"""A Ray of this machine alone, for the tests of one module or a benchmark."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

ROOT = Path(__file__).parents[2]


@contextmanager
def local_ray(num_cpus: int, object_store_memory: int = 2**28) -> Iterator[None]:
    """Started here, never somebody else's that happens to run on this machine; its workers import this tree."""
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=object_store_memory,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def cluster_to_join() -> Iterator[str]:
    """A Ray that is there already, as the override by which runs join it; they must have left it empty at the end."""
    with local_ray(num_cpus=4):
        yield f"cluster.address={ray.get_runtime_context().gcs_address}"
        left = ray.util.list_named_actors(all_namespaces=True)
        assert not left, f"runs have left {left}"
