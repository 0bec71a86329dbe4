"""The token of a run's Arrow Flight endpoints: given by the environment, or made for the run."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TOKEN_VARIABLE = "SEQUENCEMATCH_FLIGHT_TOKEN"
TOKEN_FILE = "flight_token"


def flight_token(run_folder: Path) -> str:
    """The token in `SEQUENCEMATCH_FLIGHT_TOKEN`; where that is not set, a new one, written to `RUN/flight_token` for
    its owner alone to read.
    """
    if given := os.environ.get(TOKEN_VARIABLE):
        return given
    token = secrets.token_urlsafe(32)
    path = run_folder / TOKEN_FILE
    path.unlink(missing_ok=True)  # a file of an earlier life might be readable to others
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(token)
    return token
