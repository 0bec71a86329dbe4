"""The tests run as well in the background of a script, where they inherit an ignored SIGINT."""

from __future__ import annotations

import subprocess
import sys

CHILD = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
PARENT = f"""
import os, signal, subprocess, sys
import tests.conftest
os.kill(os.getpid(), signal.SIGINT)  # is ignored here, as the script wants it
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True, timeout=60)
"""


def test_what_tests_start_answers_ctrl_c() -> None:
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", PARENT]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "True\n"
