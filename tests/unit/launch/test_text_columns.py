"""Columns of text: the same text as a rollout that is shown, for whole batches, and decoded only when asked for."""

from __future__ import annotations

import _thread
import threading

import pyarrow as pa
import pytest

from buffer.experts.tokenizer import character_tokenizer, token_contract
from buffer.reading.snapshot import EVENT_SCHEMA, BufferSnapshot
from buffer.trajectory.schema import TokenContract
from launch.queries.database import BufferDatabase, TextColumns
from launch.run_folder.task import load_run_tokenizer, save_run_tokenizer
from tests.trajectories import batch_of, row

TOKENIZER = character_tokenizer("0123456789? \n\x1b")
BACKSPACE = TOKENIZER.convert_tokens_to_ids("<backspace>")
EOS = TOKENIZER.eos_token_id
CONTRACT = token_contract(TOKENIZER, BACKSPACE)


def ids(text: str) -> list[int]:
    """`<` is a backspace, `$` the end."""
    special = {"<": BACKSPACE, "$": EOS}
    return [special.get(character) or TOKENIZER.convert_tokens_to_ids(character) for character in text]


def log(id_: str, prompt: str, actions: str, **changes: object) -> dict[str, object]:
    return row(
        id_, ids(actions), prompt_ids=ids(prompt), finish_reason="eos" if "$" in actions else "max_actions", **changes
    )


LOGS = [
    log("plain", "1 ?", "16$"),
    log("edited", "2 ?", "17<6$"),
    log("all gone", "3 ?", "17<<"),
    log("noise", "4 ?", "15<6$", executed=[None, ids("9")[0], None, None, None]),
    log("empty", "5 ?", ""),
    log("control", "\n?", "1\x1b\n"),
]
EXPECTED = {
    "plain": ("1 ?", "16", "16"),
    "edited": ("2 ?", "16", "1[-7-]6"),
    "all gone": ("3 ?", "", "[-17-]…"),
    "noise": ("4 ?", "16", "1[-{9}-]6"),
    "empty": ("5 ?", "", "…"),
    "control": ("\n?", "1\N{REPLACEMENT CHARACTER}\n", "1\N{REPLACEMENT CHARACTER}\n…"),
}


class CountedLoads:
    """Gives the tokenizer, and counts how often it was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> object:
        self.count += 1
        return TOKENIZER


def database(load: object, copies: int = 1) -> BufferDatabase:
    batch = batch_of(LOGS, CONTRACT)
    table = pa.Table.from_batches([batch, batch.slice(2)] + [batch] * (copies - 1))
    table = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    events = EVENT_SCHEMA.empty_table().append_column("shard", pa.array([], pa.int32()))
    return BufferDatabase(BufferSnapshot(CONTRACT, 0, table, events), TextColumns(CONTRACT, load))


def test_text_of_every_kind_of_log_also_beyond_one_vector_of_the_engine():
    found = database(CountedLoads(), copies=500).select(
        "select distinct id, prompt_text, final_text, marked_text from trajectories"
    )
    assert {
        id_: tuple(texts) for id_, *texts in zip(*found.to_arrow_table().to_pydict().values(), strict=True)
    } == EXPECTED


def test_text_is_decoded_only_for_a_query_that_names_it():
    load = CountedLoads()
    asked = database(load)
    assert asked.select("select count(*) as n from trajectories where id = 'plain'").to_arrow_table().to_pydict() == {
        "n": [1]
    }
    assert load.count == 0
    assert asked.select("select final_text from trajectories where id = 'plain'").to_arrow_table().num_rows == 1
    assert asked.select("select prompt_text from trajectories where false").to_arrow_table().num_rows == 0
    assert load.count == 1


def test_a_run_without_the_right_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer, neither in tokenizer/ nor in a checkpoint"):
        load_run_tokenizer(tmp_path, CONTRACT)
    TOKENIZER.save_pretrained(tmp_path / "checkpoints" / "pretrain" / "step-000010")
    assert load_run_tokenizer(tmp_path, CONTRACT).get_vocab() == TOKENIZER.get_vocab()
    save_run_tokenizer(TOKENIZER, tmp_path)
    assert load_run_tokenizer(tmp_path, CONTRACT).get_vocab() == TOKENIZER.get_vocab()
    other = TokenContract(CONTRACT.vocab_size, BACKSPACE, EOS, tokenizer_hash="other")
    with pytest.raises(ValueError, match="is not the one that the trajectories were written with"):
        load_run_tokenizer(tmp_path, other)

    def refuse() -> object:
        raise ValueError("no tokenizer here")

    asked = database(refuse)
    with pytest.raises(ValueError, match=r"^no tokenizer here$"):
        asked.run(lambda: asked.select("select marked_text from trajectories").to_arrow_table())
    asked.close()


FOR_EVER = (
    f"select sum(hash({' * '.join(f't{number}.row' for number in range(9))})) "
    f"from {', '.join(f'trajectories t{number}' for number in range(9))}"
)


def test_ctrl_c_ends_a_query_that_would_take_for_ever():
    asked = database(CountedLoads(), copies=500)
    begun = threading.Event()

    def count_for_ever() -> int:
        begun.set()
        return asked.select(FOR_EVER).to_arrow_table().num_rows

    def press_ctrl_c() -> None:
        begun.wait(timeout=60)
        _thread.interrupt_main()

    threading.Thread(target=press_ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        asked.run(count_for_ever)
    asked.close()


def test_ctrl_c_while_a_query_begins_leaves_nothing_running(monkeypatch):
    asked, start = database(CountedLoads(), copies=500), threading.Thread.start

    def start_and_press_ctrl_c(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        asked.run(lambda: asked.select(FOR_EVER).to_arrow_table().num_rows)
    asked.close()
