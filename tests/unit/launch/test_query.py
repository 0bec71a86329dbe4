"""`sequencematch query` on a folder of files: formats, the list of tables, errors in one line, and no way to write."""

from __future__ import annotations

import csv
import io
import json
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from buffer.store.shard import SampleKey
from launch.cli import app
from tests.stores import open_store
from tests.trajectories import BORN, batch_of, expert_row, row

ROWS = (
    row("p0", [5, 6, 1, 9, 2], policy_version=[0, 0, 0, 1, 1]),
    expert_row("e0", [10, 11, 2]),
    expert_row("e1", [12, 13, 1, 12, 2], executed=[None, 20, None, None, None], created_at=BORN + timedelta(seconds=2)),
    row("p1", reward=0.5),
    row("p2", [4, 4], policy_version=[1, 1]),
    row("p3", [30, 31], policy_version=[2, 2], executed=[None, 17]),
    expert_row("e2", [3]),
    *(row(f"p{number}", [8, 2], policy_version=[3, 3]) for number in (4, 5, 6)),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("name: golden\n")
    store = open_store(folder / "buffer" / "shard-000", max_staleness=2, sampler="fifo", max_times_sampled=9)
    store.insert(batch_of(ROWS[:4]))
    assert store.sample(SampleKey("pretrain", 0, "expert"), 2, 1) is not None
    assert store.sample(SampleKey("tune", 0, "policy"), 2, 1) is not None
    store.checkpointed("tune", 1)
    store.insert(batch_of(ROWS[4:]))
    assert store.sample(SampleKey("tune", 1, "policy"), 2, 3) is not None  # p0 and p1 are stale by now
    assert store.sample(SampleKey("tune", 1, "expert"), 1, 3) is not None
    store.close()
    return folder


def query(run: Path, *arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["query", str(run), *arguments])


def stdout(run: Path, *arguments: str) -> str:
    result = query(run, *arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refusal(run: Path, *arguments: str) -> str:
    """The one line of an error that the user can mend."""
    result = query(run, *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def test_without_a_query_tables_and_columns_are_listed(run):
    text = stdout(run)
    for name in ("trajectories  10 rows", "draws  7 rows", "removals  2 rows", "rejections  0 rows", "events  6 rows"):
        assert name in text
    assert "marked_text varchar" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines() if "Example" not in line) <= 80
    assert json.loads(stdout(run, "--format", "json"))["draws"]["columns"]["logged_at"] == "TIMESTAMP WITH TIME ZONE"


def test_a_join_over_rows_and_draws(run):
    sql = (
        "select t.source, count(*) as drawn, max(t.staleness) as stalest from draws d join trajectories t "
        "using (shard, row) where t.live group by 1 order by 1"
    )
    assert json.loads(stdout(run, sql, "--format", "json")) == [
        {"source": "expert", "drawn": 3, "stalest": None},
        {"source": "policy", "drawn": 2, "stalest": 2},
    ]


def test_every_kind_of_value_in_every_format(run, tmp_path):
    sql = (
        "select row, executed, sampling, reward, created_at, 'nan'::float as bad, sum(row) over () as total "
        "from trajectories where id in ('e1', 'p1') order by row"
    )
    rows = json.loads(stdout(run, sql, "--format", "json"))
    assert rows[0] == {
        "row": 2,
        "executed": [None, 20, None, None, None],
        "sampling": None,
        "reward": None,
        "created_at": "2026-01-01T00:00:02+00:00",
        "bad": None,
        "total": 5,
    }
    assert rows[1]["sampling"] == {"temperature": 1.0, "top_p": 1.0, "backspace": True}
    fields = list(csv.reader(io.StringIO(stdout(run, sql, "--format", "csv"))))
    assert fields[0] == ["row", "executed", "sampling", "reward", "created_at", "bad", "total"]
    assert fields[1] == ["2", "[null, 20, null, null, null]", "", "", "2026-01-01T00:00:02+00:00", "", "5"]
    file = tmp_path / "rows.arrows"
    assert stdout(run, sql, "--format", "arrow", "--output", str(file)) == ""
    assert pa.ipc.open_stream(file.read_bytes()).read_all().column("reward").to_pylist() == [None, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrows"]


def test_a_table_for_people_fits_the_terminal(run):
    narrow = stdout(run, "select id, live, actions from trajectories where row <= 1 order by row")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in narrow.splitlines() if line.startswith("│")]
    assert cells[0] == ["id", "live", "actions"]
    assert cells[-2:] == [["p0", "false", "[5, 6, 1, 9, 2]"], ["e0", "true", "[10, 11, 2]"]]
    wide = stdout(run, "select * exclude (prompt_text, final_text, marked_text) from trajectories where row = 2")
    assert max(map(len, wide.splitlines())) <= 80
    many = stdout(run, "select a.row from trajectories a, trajectories b")
    assert len(many.splitlines()) <= 62
    assert "100 rows" in many
    assert "(50 shown)" in many
    assert "0 rows" in stdout(run, "select row from trajectories where row < 0")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("selec 1", 'Parser Error: syntax error at or near "selec"'),
        ("select nope from draws", 'Binder Error: Referenced column "nope" not found in FROM clause! Candidate bind'),
        ("select 'a'::int from draws", "Conversion Error: Could not convert string 'a' to INT32"),
        ("select marked_text from trajectories", "holds no tokenizer"),
        ("", "give one query, not 0"),
        ("select 1; drop view draws", "give one query, not 2"),
        ("copy draws to 'stolen.csv'", "a query only reads: give a SELECT, not COPY"),
        ("create table t as select 1", "a query only reads: give a SELECT, not CREATE"),
        ("attach 'stolen.db'", "a query only reads: give a SELECT, not ATTACH"),
        ("select * from read_csv('config.yaml')", "file system operations are disabled"),
        ("select * from 'config.yaml'", "Catalog Error: Table with name config.yaml does not exist!"),
        ("select * from snapshot", "Catalog Error: Table with name snapshot does not exist!"),
        ("set enable_external_access = true", "a query only reads"),
    ],
)
def test_what_is_refused_and_why(run, monkeypatch, sql, message):
    monkeypatch.chdir(run)
    for form in ("table", "json"):
        assert message in refusal(run, sql, "--format", form)
    assert sorted(path.name for path in run.iterdir()) == ["buffer", "config.yaml"]


def test_mistakes_around_a_query(run, tmp_path):
    assert "is not a run folder" in refusal(tmp_path, "select 1")
    (tmp_path / "config.yaml").write_text("")
    assert "holds no replay buffer" in refusal(tmp_path, "select 1")
    assert "--format json, csv or arrow" in refusal(run, "select 1", "--output", "x")
    assert "give one, or list the tables with json" in refusal(run, "--format", "csv")
    assert "No such file or directory" in refusal(
        run, "select 1", "--format", "csv", "--output", f"{tmp_path}/no/x.csv"
    )
