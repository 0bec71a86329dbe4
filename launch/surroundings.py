"""What a process expects of the machine it runs on, and containers, clusters and plain terminals may not offer: a home
folder and a user's name, which many libraries need, a short path for Ray's sockets, and UTF-8.
"""

from __future__ import annotations

import codecs
import getpass
import io
import locale
import os
import stat
import sys
import tempfile
from pathlib import Path

from launch.errors import UserError

MAX_SOCKET_FOLDER_BYTES = 39
"""107 less `/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store`."""

_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # Ray makes a folder of its own there


def provide_home() -> None:
    """Give a user without a home folder that can be written, or without a name, one for this process and its own."""
    home = os.path.expanduser("~")
    if not os.access(home, os.W_OK | os.X_OK):  # as also `~`, where nobody knows better
        os.environ["HOME"] = str(_private_folder())
        print(f"home folder {home} cannot be written: using {os.environ['HOME']}", file=sys.stderr)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["USER"] = f"user-{os.getuid()}"


def provide_socket_folder() -> None:
    """Where the path of TMPDIR is too long for Ray's sockets, let Ray work elsewhere; UserError if it cannot."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    wanted = os.environ.get(variable, "")
    if len(os.fsencode(wanted)) <= MAX_SOCKET_FOLDER_BYTES:
        return
    short = next((folder for folder in _SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)), None)
    if short is None or variable == "RAY_TMPDIR":
        raise UserError(
            f"{variable}={wanted} is too long a path for the sockets of Ray: set RAY_TMPDIR to a folder whose path has "
            f"at most {MAX_SOCKET_FOLDER_BYTES} bytes"
        )
    os.environ["RAY_TMPDIR"] = short


def use_utf8() -> None:
    """Where files would be read in another encoding, begin this process anew in UTF-8 mode; the terminal stays."""
    if codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:replace"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def tolerate_terminal() -> None:
    """Print `?` for what the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def _private_folder() -> Path:
    """One for all commands of the user, unless somebody else was there first."""
    folder = Path(tempfile.gettempdir()) / f"sequencematch-home-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700:
        return folder
    return Path(tempfile.mkdtemp(prefix=folder.name))
