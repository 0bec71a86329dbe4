"""Where processes of torch.distributed find each other, and why they lost each other."""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist


def open_rendezvous(host: str, size: int, timeout_s: float) -> dist.TCPStore:
    """The meeting point of `size` processes, held by this one; its `port` is a free one of the address `host`."""
    import torch.distributed as dist

    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, 0), family=family)  # left to itself, the store listens on every interface
    return dist.TCPStore(
        host,
        listening.getsockname()[1],
        size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def reason_of(error: BaseException) -> str:
    """Of a process group's error: gloo's first sentence, without the place in its source; others' first line."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(". This is typically")[0]
