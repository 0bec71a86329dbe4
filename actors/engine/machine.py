"""What an engine needs of the machine beside Python's packages; what is missing is said before anything long starts.

Imports nothing heavy: commands call this first.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import sysconfig
from pathlib import Path

KERNEL_LIBRARIES = {"libnuma.so.1": "libnuma1"}
"""Shared libraries of vLLM's CPU kernels, with the Debian packages that hold them."""


def check_machine(enforce_eager: bool) -> None:
    """Refuse a machine on which an engine cannot start or would fail at its first step.

    The CPU build of vLLM compiles only where it is asked to (`enforce_eager=False`), with a C++ compiler; on GPUs
    Triton compiles the launchers of kernels in any case, with a C compiler. Both include Python's headers.

    Raises:
        ValueError: names all that is missing, and the Debian packages that bring it.
    """
    on_cpu = _is_cpu_build()
    missing = [(name, package) for name, package in KERNEL_LIBRARIES.items() if on_cpu and not _loads(name)]
    reason = ""
    if not (on_cpu and enforce_eager):
        reason = " (actors.enforce_eager=false compiles the model)" if on_cpu else " (Triton compiles kernels)"
        missing += _missing_for_compilation("CXX" if on_cpu else "CC")
    if missing:
        names, packages = ([each[part] for each in missing] for part in (0, 1))
        raise ValueError(
            f"vLLM needs {' and '.join(names)} on this machine{reason}: `apt-get install {' '.join(packages)}` brings "
            f"{'them' if len(missing) > 1 else 'it'} (Debian, Ubuntu)"
        )


def _is_cpu_build() -> bool:
    """As vLLM itself tells it: by the name or the version of its package."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _missing_for_compilation(variable: str) -> list[tuple[str, str]]:
    """variable: which names the compiler, for Inductor (CXX) or for Triton (CC)."""
    usual = ["g++"] if variable == "CXX" else ["gcc", "clang"]
    given = os.environ.get(variable)
    missing = []
    if not any(map(shutil.which, [given] if given else usual)):
        missing.append((f"a compiler ({given or usual[0]})", usual[0]))
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(("Python's headers (Python.h)", "python3-dev"))
    return missing
