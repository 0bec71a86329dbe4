"""Read-only access to the live rows of a shard over Arrow Flight, for programs that are no part of the run.

    flight    path [source], one per source: its live rows with all stored columns
              (see `buffer.trajectory.schema.stored_schema`)
    ticket    the source

Each answer is a snapshot of the shard's files (see `buffer.reading.snapshot`), which are mapped and sent. It does not
use the store, so it delays inserts and samples no longer than it holds the interpreter. Every call must bring the token
as `authorization: Bearer TOKEN`; calls other than reads are refused.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import flight

from buffer.reading.snapshot import read_shard
from buffer.trajectory.schema import SOURCES, TokenContract, stored_schema

SHUTDOWN_TIMEOUT_S = 5.0
READING = ("LIST_FLIGHTS", "GET_FLIGHT_INFO", "GET_SCHEMA", "DO_GET", "LIST_ACTIONS")
"""Names of the methods that are served."""

_UNKNOWN_SIZE = -1


class FlightEndpoint:
    """A running Flight server over the folder of one shard."""

    def __init__(
        self, folder: Path, contract: TokenContract, host: str, port: int, token: str, image: Callable[[], bytes]
    ) -> None:
        """Begin to listen, or ValueError. port: 0 = any that is free. image: of the catalog, see `read_shard`."""
        assert token, "an endpoint without a token would be open to everybody"
        try:
            self._server = _Server(folder, stored_schema(contract), f"grpc+tcp://{host}:{port}", token, image)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"no Arrow Flight endpoint can be opened at {host}:{port} ({str(error).splitlines()[0]}): choose "
                "another buffer.flight.port or buffer.flight.host"
            ) from None
        self.location = f"grpc+tcp://{host}:{self._server.port}"

    def close(self) -> None:
        """Stop listening; answers under way may take `SHUTDOWN_TIMEOUT_S` to end."""
        ending = threading.Thread(target=self._server.shutdown, daemon=True)
        ending.start()
        ending.join(timeout=SHUTDOWN_TIMEOUT_S)


class _Server(flight.FlightServerBase):  # type: ignore[misc]  # pyarrow ships no types
    def __init__(self, folder: Path, schema: pa.Schema, location: str, token: str, image: Callable[[], bytes]) -> None:
        super().__init__(location, middleware={"token": _TokenCheck(token)})
        self._folder = folder
        self._schema = schema
        self._image = image

    def list_flights(self, context: flight.ServerCallContext, criteria: bytes) -> Iterator[flight.FlightInfo]:
        """One for each source."""
        return iter([self._info(source) for source in SOURCES])

    def get_flight_info(
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.FlightInfo:
        """Of the path [source]."""
        path = descriptor.path if descriptor.descriptor_type == flight.DescriptorType.PATH else []
        return self._info(_source(b"/".join(path)))

    def get_schema(self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor) -> flight.SchemaResult:
        """Of the path [source]."""
        return flight.SchemaResult(self.get_flight_info(context, descriptor).schema)

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        """The live rows of a source."""
        source = _source(ticket.ticket)
        snapshot = read_shard(self._folder, lambda _: self._image())
        wanted = snapshot.live & pc.equal(snapshot.stored.column("source"), source).to_numpy(zero_copy_only=False)
        batches = snapshot.stored.append_column("wanted", pa.array(wanted)).to_batches()
        chosen = (batch.filter(batch.column("wanted")).select(self._schema.names) for batch in batches)
        return flight.GeneratorStream(self._schema, chosen)

    def list_actions(self, context: flight.ServerCallContext) -> list[flight.ActionType]:
        """There are none."""
        return []

    def _info(self, source: str) -> flight.FlightInfo:
        # Without a location: what is fetched comes from where the information was asked for.
        endpoint = flight.FlightEndpoint(source.encode(), [])
        descriptor = flight.FlightDescriptor.for_path(source)
        return flight.FlightInfo(self._schema, descriptor, [endpoint], _UNKNOWN_SIZE, _UNKNOWN_SIZE)


class _TokenCheck(flight.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow ships no types
    """Lets no call pass without the token, and none that does not read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def start_call(self, info: flight.CallInfo, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        """Called before every call is looked at."""
        sent = [value for name, values in headers.items() if name.lower() == "authorization" for value in values]
        given = [value.encode() if isinstance(value, str) else value for value in sent]
        if len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
            raise flight.FlightUnauthenticatedError("the header `authorization: Bearer TOKEN` is missing or wrong")
        method = info.method.name
        if method not in READING:
            what = method.lower().removeprefix("do_")
            raise flight.FlightUnauthorizedError(f"this endpoint is read-only: {what} is not permitted")


def _source(name: bytes) -> str:
    source = name.decode(errors="replace")
    if source not in SOURCES:
        raise flight.FlightServerError(f"there is no flight {source!r}; there are: {', '.join(SOURCES)}")
    return source
