"""A store that is killed with SIGKILL fifty times at random points: see `tests.store_lives`."""

from __future__ import annotations

import pytest

from tests.store_lives import check_kills


@pytest.mark.parametrize("fsync", ["batch", "none"])
def test_25_kills_lose_nothing_acknowledged(tmp_path, fsync):
    check_kills(tmp_path / "b", fsync, kills=25, seed=0)
