"""The command line, and what it does with the other rooms.

api             the functions that scripts import, and that the commands call
cli, training, submit, generation, rollout_view     commands without a folder of their own, and what they share
settings/       what a recipe says
run_folder/     what a run leaves on disk
run/, cluster/  the driver of a run on Ray, and where its processes lie
monitoring/     a run while it goes on: live display, log, Prometheus
queries/        SQL over the replay buffer, and its audit
evaluation/, compare/, report/, export/    what is made of a trained model and of a run
"""

from __future__ import annotations

import os
from pathlib import Path

from launch.surroundings import provide_home

provide_home()  # first of all: what is imported later looks for its files there

# Ray reads these once, when it is first imported, so they are set before any module here imports it.
# A Ray started by a run protects itself with the user's token, but joining it by its address would not send one.
if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or (Path.home() / ".ray/auth_token").is_file():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

RAY_START_TIMEOUT_S = 180
RAY_START_VARIABLES = ("RAY_gcs_server_port_wait_time_s", "RAY_raylet_start_wait_time_s")
# Ray waits 30 s for its GCS server and 10 s, three times over, for its raylet, which is too short on a busy machine.
for _variable in RAY_START_VARIABLES:
    os.environ.setdefault(_variable, str(RAY_START_TIMEOUT_S))
