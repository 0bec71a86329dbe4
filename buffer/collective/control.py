"""What the two ends of a transfer say to each other, over a TCP connection of its own.

The sender opens with a nonce; the receiver answers with its request, signed with the token that came with the
publication. Then the sender's words follow (`Word`), one before each bucket, so the receiver always knows whether there
is more to wait for, whatever carries the buckets.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

NONCE_BYTES = 32
NO_PART = -1

_REQUEST = struct.Struct("!qq")
_WORD = struct.Struct("!BH")
_MAC_BYTES = hashlib.sha256().digest_size


class Word(IntEnum):
    """ADMITTED (with a port) and READY begin a transfer; BUCKET comes before each bucket; DONE and RECEIVED end it.

    REPLACED: what was asked for is not, or no longer, on offer.
    """

    ADMITTED = 1
    READY = 2
    BUCKET = 3
    DONE = 4
    RECEIVED = 5
    REPLACED = 6


@dataclass(frozen=True)
class Request:
    """Numbers of the parts that a receiver asks for. kept: NO_PART where it has them, or there are none."""

    kept: int
    changed: int


class Channel:
    """One end of the connection. Each method waits as long as `socket.settimeout` says and raises OSErrors."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def challenge(self, token: bytes) -> Request | None:
        """At the sender: the request of who knows `token`; None of anybody else."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.connection.sendall(nonce)
        signed = self._read(_MAC_BYTES + _REQUEST.size)
        mac, body = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, _mac(token, nonce, body)):
            return None
        return Request(*_REQUEST.unpack(body))

    def ask(self, token: bytes, request: Request) -> None:
        """At the receiver."""
        nonce = self._read(NONCE_BYTES)
        body = _REQUEST.pack(request.kept, request.changed)
        self.connection.sendall(_mac(token, nonce, body) + body)

    def say(self, word: Word, port: int = 0) -> None:
        """To the other end."""
        self.connection.sendall(_WORD.pack(word, port))

    def hear(self) -> tuple[Word, int]:
        """The other end's next word, and a port with ADMITTED."""
        word, port = _WORD.unpack(self._read(_WORD.size))
        if word not in set(Word):
            raise ConnectionError("it speaks another protocol")
        return Word(word), port

    def _read(self, size_bytes: int) -> bytes:
        found = bytearray()
        while len(found) < size_bytes:
            more = self.connection.recv(size_bytes - len(found))
            if not more:
                raise ConnectionResetError("the other end closed the connection")
            found += more
        return bytes(found)


def _mac(token: bytes, nonce: bytes, body: bytes) -> bytes:
    return hmac.digest(token, nonce + body, "sha256")
