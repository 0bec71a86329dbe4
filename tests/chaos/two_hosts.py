"""Two hosts on one machine, as far as the network goes: two network namespaces, and a switch between them."""

from __future__ import annotations

import os
import subprocess

COMMAND_TIMEOUT_S = 20.0
NEAR, FAR = "198.18.77.1", "198.18.77.2"
"""Addresses of this host and the other one, in the range that is set aside for tests of networks (RFC 2544)."""


class TwoHosts:
    """The namespace of this process, the other host's, and a third one with a bridge; a context manager. Needs root."""

    def __init__(self) -> None:
        """Raises:
        PermissionError: this process may make no network namespaces, or the kernel has no bridges.
        """
        mark = f"{os.getpid() % 0xFFFFF:05x}"
        self._switch, self._far = f"switch-{mark}", f"far-{mark}"
        self._near_link = f"smn{mark}"
        try:
            for namespace in (self._switch, self._far):
                _ip("netns", "add", namespace)
            _ip("-n", self._switch, "link", "add", "bridge", "up", "type", "bridge")
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            self.remove()
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            raise PermissionError(f"no network namespaces here: {str(reason).strip()}") from None
        try:
            self._connect()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @property
    def on_the_far_one(self) -> tuple[str, ...]:
        """What comes before a command that is to run on the other host."""
        return "ip", "netns", "exec", self._far

    def cut(self) -> None:
        """Pull the plug at the switch: packets are lost without a word, and both hosts have link and address still."""
        _ip("-n", self._switch, "link", "set", "to-far", "nomaster")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("-n", self._switch, "link", "set", "to-far", "master", "bridge")

    def remove(self) -> None:
        """Take all of it away."""
        _ip("link", "delete", self._near_link, check=False)  # the other links end with their namespaces
        for namespace in (self._switch, self._far):
            _ip("netns", "delete", namespace, check=False)

    def _connect(self) -> None:
        _ip("link", "add", self._near_link, "type", "veth", "peer", "name", "to-near", "netns", self._switch)
        _ip("-n", self._far, "link", "add", "uplink", "type", "veth", "peer", "name", "to-far", "netns", self._switch)
        for port in ("to-near", "to-far"):
            _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", self._far, "link", "set", "lo", "up")
        for host, link, address in ((("-n", self._far), "uplink", FAR), ((), self._near_link, NEAR)):
            _ip(*host, "address", "add", f"{address}/24", "dev", link)
            _ip(*host, "link", "set", link, "up")


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
