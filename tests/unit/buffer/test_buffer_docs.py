"""The examples of docs/buffer.md, run as they stand there, in a folder with a run at runs/RUN."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from buffer.experts.tokenizer import character_tokenizer, token_contract
from buffer.settings import BufferSettings
from buffer.store.store import ReplayStore
from launch.cli import app
from launch.run_folder.task import save_run_tokenizer
from launch.settings.recipe import read_recipe, write_recipe
from tests.trajectories import batch_of, fresh_key, row

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs" / "buffer.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
PROGRAMS = [block for language, block in BLOCKS if language == "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, each with a sealed segment, an open one, draws and removals."""
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "runs" / "RUN"
    run.mkdir(parents=True)
    write_recipe(read_recipe(ROOT / "launch" / "recipes" / "arithmetic_cpu.yaml"), run / "config.yaml")
    tokenizer = character_tokenizer("0123456789")
    contract = token_contract(tokenizer, tokenizer.convert_tokens_to_ids("<backspace>"))
    save_run_tokenizer(tokenizer, run)
    for shard in range(2):
        settings = BufferSettings(capacity=8, min_size=1, segment_bytes=4000)
        store = ReplayStore(run / "buffer" / f"shard-{shard:03d}", contract, settings, seed=0)
        for first in range(0, 12, 3):
            rows = [row(f"{shard}-{number}", reward=1.0) for number in range(first, first + 3)]
            store.insert(batch_of([{**each, "actions": [5, contract.backspace_id, 6]} for each in rows], contract))
            assert store.sample(fresh_key(), 2, 0) is not None
        store.close()
    return folder


def test_the_page_shows_every_tool():
    text = "\n".join([*COMMANDS, *PROGRAMS])
    for tool in ("sequencematch query", "sequencematch audit", "duckdb.sql", "pl.read_ipc_stream", "Dataset.from_file"):
        assert tool in text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_works(folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.split("import ")[-1].split()[0])
def test_a_program_of_the_page_works(folder, monkeypatch, capsys, program):
    monkeypatch.chdir(folder)
    exec(compile(program, "docs/buffer.md", "exec"), {})
    assert capsys.readouterr().out.strip()
