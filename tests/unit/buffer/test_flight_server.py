"""The Flight endpoint of a shard: rows for who has the token, and nothing else for anybody."""

from __future__ import annotations

import os
import stat

import pytest
from pyarrow import flight

from buffer import disk
from buffer.reading.snapshot import read_shard
from buffer.service.flight import FlightEndpoint
from launch.run_folder.folder import TOKEN_FILE, TOKEN_VARIABLE, flight_token
from tests.stores import draw, open_store
from tests.trajectories import CONTRACT, batch_of, expert_row, ids_of, numbered

TOKEN = "s3cret"


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path, capacity=50, segment_bytes=8_000, max_staleness=5)
    yield store
    store.close()


@pytest.fixture
def endpoint(store, tmp_path):
    endpoint = FlightEndpoint(tmp_path, CONTRACT, "127.0.0.1", 0, TOKEN, store.catalog_image)
    yield endpoint
    endpoint.close()


def options(token=TOKEN):
    return flight.FlightCallOptions(timeout=20, headers=[(b"authorization", f"Bearer {token}".encode())])


def rows(endpoint, source):
    with flight.connect(endpoint.location) as client:
        info = client.get_flight_info(flight.FlightDescriptor.for_path(source), options())
        return client.do_get(info.endpoints[0].ticket, options()).read_all()


def test_live_rows_of_sealed_and_open_segments_while_the_store_goes_on(store, endpoint):
    assert rows(endpoint, "policy").num_rows == 0
    for first in range(0, 70, 10):
        store.insert(numbered(first, 10, version=first // 10))
    store.insert(batch_of([expert_row("e")]))
    assert store.status().sealed_segments > 1
    assert ids_of(rows(endpoint, "expert")) == ["e"]
    live = rows(endpoint, "policy")
    assert ids_of(live) == [str(number) for number in range(20, 70)], "the newest 50"
    assert live.column("row").to_pylist() == list(range(20, 70))
    draw(store, 1, version=8)  # rows of versions before 3 are stale
    live = rows(endpoint, "policy")
    assert ids_of(live) == [str(number) for number in range(30, 70)]
    expected = {row["id"]: row for first in range(30, 70, 10) for row in numbered(first, 10, first // 10).to_pylist()}
    assert [{**expected[row["id"]], "row": row["row"]} for row in live.to_pylist()] == live.to_pylist()


def test_rows_where_the_store_keeps_its_catalog_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LOCAL_FILE_SYSTEMS", frozenset())
    store = open_store(tmp_path)
    store.insert(numbered(0, 5))
    with pytest.raises(OSError, match="on a shared file system a shard keeps its catalog to itself"):
        read_shard(tmp_path)
    endpoint = FlightEndpoint(tmp_path, CONTRACT, "127.0.0.1", 0, TOKEN, store.catalog_image)
    assert ids_of(rows(endpoint, "policy")) == ["0", "1", "2", "3", "4"]
    endpoint.close()
    store.close()
    assert read_shard(tmp_path).stored.num_rows == 5


def test_flights_are_listed(endpoint):
    with flight.connect(endpoint.location) as client:
        infos = list(client.list_flights(b"", options()))
        descriptor = flight.FlightDescriptor.for_path("policy")
        assert client.get_schema(descriptor, options()).schema == infos[0].schema
        with pytest.raises(flight.FlightServerError, match=r"there is no flight 'secrets'; there are: "):
            client.get_flight_info(flight.FlightDescriptor.for_path("secrets"), options())
        with pytest.raises(flight.FlightServerError, match="there is no flight"):
            client.do_get(flight.Ticket(b"../../etc"), options()).read_all()
    assert {info.descriptor.path[0] for info in infos} == {b"policy", b"expert"}


def send(writer, batch):
    writer.write_batch(batch)
    writer.close()


CALLS = {
    "list": lambda client, options: list(client.list_flights(b"", options)),
    "info": lambda client, options: client.get_flight_info(flight.FlightDescriptor.for_path("policy"), options),
    "schema": lambda client, options: client.get_schema(flight.FlightDescriptor.for_path("policy"), options),
    "get": lambda client, options: client.do_get(flight.Ticket(b"policy"), options).read_all(),
    "actions": lambda client, options: list(client.list_actions(options)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "sent",
    [
        flight.FlightCallOptions(timeout=20),
        options("wrong"),
        options(""),
        flight.FlightCallOptions(timeout=20, headers=[(b"authorization", TOKEN.encode())]),
        flight.FlightCallOptions(
            timeout=20, headers=[(b"authorization", f"Bearer {TOKEN}".encode()), (b"authorization", b"Bearer wrong")]
        ),
    ],
    ids=["none", "wrong", "empty", "no scheme", "two"],
)
def test_no_call_without_the_token(endpoint, call, sent):
    # pyarrow gives an OSError for `get_schema`; it says the same.
    with flight.connect(endpoint.location) as client, pytest.raises((flight.FlightUnauthenticatedError, OSError)) as no:
        CALLS[call](client, sent)
    assert "the header `authorization: Bearer TOKEN` is missing or wrong. Detail: Unauthenticated" in str(no.value)


def test_nothing_can_be_written_or_done(store, endpoint):
    batch = numbered(0, 3)
    descriptor = flight.FlightDescriptor.for_path("policy")
    with flight.connect(endpoint.location) as client:
        with pytest.raises(flight.FlightUnauthorizedError, match="read-only: action"):
            list(client.do_action(flight.Action("drop", b""), options()))
        with pytest.raises(flight.FlightUnauthorizedError, match="read-only: put"):
            send(client.do_put(descriptor, batch.schema, options())[0], batch)
        with pytest.raises(flight.FlightUnauthorizedError, match="read-only: exchange"):
            client.do_exchange(descriptor, options())[1].read_all()
        assert list(client.list_actions(options())) == []
    assert store.next_row == 0


def test_an_address_that_is_taken_is_named(store, endpoint, tmp_path):
    port = int(endpoint.location.rpartition(":")[2])
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} .*: choose another buffer\.flight\.port"):
        FlightEndpoint(tmp_path, CONTRACT, "127.0.0.1", port, TOKEN, store.catalog_image)


def test_the_token_is_made_for_its_owner_alone_or_taken_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    file = tmp_path / TOKEN_FILE
    file.write_text("left readable by an earlier life")
    token = flight_token(tmp_path)
    assert len(token) >= 32
    assert file.read_text() == token
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert flight_token(tmp_path) != token
    file.unlink()
    monkeypatch.setenv(TOKEN_VARIABLE, "mine")
    assert flight_token(tmp_path) == "mine"
    assert not file.exists()
