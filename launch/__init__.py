"""Configuration, command line, the driver on Ray, evaluation and benchmarks."""

from __future__ import annotations

import os
from pathlib import Path

# Ray reads these once, when it is first imported, so they are set before any module here imports it.
# A Ray started by a run protects itself with the user's token, but joining it by its address would not send one.
if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or (Path.home() / ".ray/auth_token").is_file():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
