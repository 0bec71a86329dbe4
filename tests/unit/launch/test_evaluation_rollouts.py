"""Which rollouts an evaluation makes, and which of them it takes from an earlier attempt."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console
from transformers import LlamaConfig

from actors.settings import RolloutSettings
from buffer.experts.tasks import Task, load_task
from buffer.experts.tokenizer import backspace_token_id, character_tokenizer
from buffer.settings import ArithmeticTaskSettings, TextTaskSettings
from launch.errors import UserError
from launch.evaluation.report import show_evaluation
from launch.evaluation.results import HELD_OUT, CheckpointResult, Evaluation, Target
from launch.evaluation.rollouts import (
    KeptRollouts,
    RolloutGroup,
    plan_groups,
    recovery_obstacle,
    rollouts_key,
    weights_digest,
)
from launch.evaluation.run import check_evaluation, evaluate
from launch.settings.evaluation import (
    GREEDY,
    RECOVERY,
    SAMPLED,
    ContrastiveSearch,
    Decoding,
    EvaluationSettings,
    MauveSettings,
    parse_decoding,
)
from launch.settings.recipe import read_recipe
from launch.statistics import Estimate

TASK = load_task(ArithmeticTaskSettings(max_digits=1, train_questions=10, held_out_questions=8))
ROLLOUT = RolloutSettings(max_new_tokens=5, max_actions=9)


def groups_of(
    task: Task = TASK, rollout: RolloutSettings = ROLLOUT, seed: int = 0, **settings: object
) -> list[RolloutGroup]:
    return plan_groups(task, task.contract(), task.held_out, rollout, EvaluationSettings(**settings), seed)


@pytest.mark.parametrize(
    ("text", "decoding"),
    [
        ("ancestral", Decoding(SAMPLED)),
        ("greedy", Decoding(GREEDY, temperature=0.0)),
        ("top_p=0.950", Decoding("top_p=0.95", top_p=0.95)),
        ("temperature=.7", Decoding("temperature=0.7", temperature=0.7)),
        ("contrastive=4:0.5", Decoding("contrastive=4:0.5", 0.0, contrastive=ContrastiveSearch(4, 0.5))),
        ("contrastive", Decoding("contrastive", 0.0, contrastive=ContrastiveSearch(5, 0.6))),
    ],
)
def test_decodings_by_name(text: str, decoding: Decoding) -> None:
    assert parse_decoding(text) == decoding


@pytest.mark.parametrize(
    "text", ["", "beam", "top_p", "top_p=", "top_p=1", "top_p=x", "temperature=1", "temperature=-1", "greedy=2",
             "contrastive=1:0.5", "recovery", "recovery=1", "recovery=x",
             "contrastive=4:1.5", "contrastive=4", "temperature=nan"]
)  # fmt: skip
def test_other_decodings_are_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"no decoding .*choose from ancestral, greedy, top_p=0\.95"):
        parse_decoding(text)
    with pytest.raises(ValueError, match="no decoding"):
        EvaluationSettings(decoding=(text,))
    with pytest.raises(ValueError, match="named twice"):
        EvaluationSettings(decoding=("top_p=0.9", "top_p=0.90"))


def test_mistakes_of_several_tokens_are_forced_where_that_makes_sense() -> None:
    groups = {each.name: each for each in groups_of(decoding=("recovery=3",), ban_deleted="both")}
    assert [groups[name].num_forced for name in (SAMPLED, RECOVERY, "recovery=3", "recovery=3, allowed")] == [
        0,
        1,
        3,
        3,
    ]
    one, three = (groups[name].forced_prefixes for name in (RECOVERY, "recovery=3"))
    assert one is not None
    assert three is not None
    assert [tokens[0] for tokens in three] == [token for (token,) in one], "the same mistake, and more of it"
    with pytest.raises(ValueError, match=r"recovery=5 leaves no room .* fewer tokens than .*max_new_tokens=5"):
        groups_of(decoding=("recovery=5",))
    with pytest.raises(UserError, match="recovery=24 leaves no room"):
        read_recipe(Path("launch/recipes/text_cpu.yaml"), ["evaluation.decoding=[recovery=24]"])


def test_a_recipe_with_too_few_texts_for_mauve_is_refused_before_training() -> None:
    assert EvaluationSettings(examples=60, mauve=MauveSettings(clusters=6)).mauve is not None
    with pytest.raises(ValueError, match=r"needs 60 texts .*examples=59 are fewer: raise examples to 60, or .* to 5"):
        EvaluationSettings(examples=59, mauve=MauveSettings(clusters=6))
    with pytest.raises(UserError, match="answers of task arithmetic are right or wrong"):
        read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"), ["evaluation.mauve.clusters=5"])


def test_checkpoints_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    targets = []
    for alphabet in ("abc", "abd"):
        tokenizer = character_tokenizer(alphabet)
        folder = tmp_path / alphabet
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1)
        config.backspace_token_id = backspace_token_id(tokenizer)
        config.save_pretrained(folder)
        targets.append(Target(alphabet, folder))
    settings = read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"), [])
    with pytest.raises(UserError, match="different tokenizers"):
        evaluate(targets, settings, Console(quiet=True))


def test_groups_of_answers_and_of_texts() -> None:
    assert [each.name for each in groups_of()] == [SAMPLED, GREEDY, RECOVERY]
    texts = dataclasses.replace(TASK, is_correct=None)
    assert [each.name for each in groups_of(texts)] == [SAMPLED, RECOVERY]
    asked = groups_of(texts, decoding=("ancestral", "greedy", "top_p=0.9", "contrastive", "recovery=2"))
    assert [each.name for each in asked] == [SAMPLED, GREEDY, "top_p=0.9", "contrastive", "recovery=2", RECOVERY]
    # A wrong answer is one that is likely no more; a text is like others, and only if it is sampled.
    assert [each.sampling.temperature for each in asked[-2:]] == [1.0, 1.0]
    assert [each.sampling.temperature for each in groups_of(decoding=("recovery=2",))[-2:]] == [0.0, 0.0]
    search = asked[3]
    assert search.contrastive is not None
    assert not search.sampling.backspace


def texts_of_one_token(folder: Path, letters: str) -> Task:
    """Every continuation is one token: one of the letters."""
    files = []
    for index in range(8):
        files.append(folder / f"{index}.txt")
        files[-1].write_text(f"ab{letters[index % len(letters)]}")
    task = TextTaskSettings(dataset="files", files=tuple(map(str, files)), prompt_tokens=2, target_tokens=1)
    return load_task(task, character_tokenizer("abcd"))


def test_recovery_is_left_out_where_every_text_begins_with_the_same_token(tmp_path: Path) -> None:
    same, other = (texts_of_one_token(tmp_path, letters) for letters in ("c", "cd"))
    assert [each.name for each in groups_of(same, decoding=("recovery=2",), ban_deleted="both")] == [
        SAMPLED, "sampled, banned"
    ]  # fmt: skip
    obstacle = recovery_obstacle(same, same.contract(), same.held_out, ROLLOUT)
    assert obstacle == "1 of 1 examples have no plausible wrong token to begin with"
    assert [each.name for each in groups_of(other)] == [SAMPLED, RECOVERY]
    one_token = RolloutSettings(max_new_tokens=1)
    assert [each.name for each in groups_of(rollout=one_token)] == [SAMPLED, GREEDY]
    obstacle = recovery_obstacle(TASK, TASK.contract(), TASK.held_out, one_token)
    assert obstacle == "actors.rollout.max_new_tokens=1 leaves no room for an answer behind a forced token"


@pytest.mark.parametrize("has_answers", [True, False])
def test_tables_do_without_the_recovery_that_was_left_out(has_answers: bool) -> None:
    number = Estimate(0.5, 0.1, 8)
    names = ("accuracy", "backspace_rate") if has_answers else ("perplexity",)
    groups = {group: dict.fromkeys(names, number) for group in (SAMPLED, GREEDY, HELD_OUT)}
    results = [CheckpointResult(label, Path(label), groups) for label in ("a", "b")]
    console = Console(file=io.StringIO(), width=80, record=True)
    show_evaluation(Evaluation.of("t", 8, 0, results, {}, {"recovery": "no wrong token"}), console)
    assert "left out: recovery (no wrong token)" in console.export_text()


def test_a_task_with_too_few_texts_for_mauve_is_refused_as_soon_as_it_is_known(tmp_path: Path) -> None:
    pytest.importorskip("mauve", reason="needs the extra `mauve`")
    task = texts_of_one_token(tmp_path, "cd")
    evaluation = EvaluationSettings(examples=40, mauve=MauveSettings(features="model", clusters=4))
    settings = read_recipe(Path("launch/recipes/text_cpu.yaml")).model_copy(update={"evaluation": evaluation})
    with pytest.raises(ValueError, match=r"needs 40 texts .* this evaluation has 1 of the 1 that the task holds out"):
        check_evaluation(settings, task)


def test_twins_differ_in_the_ban_alone() -> None:
    groups = {each.name: each for each in groups_of(ban_deleted="both", decoding=("contrastive",))}
    assert set(groups) == {
        SAMPLED, GREEDY, RECOVERY, "contrastive", "sampled, banned", "greedy, allowed", "recovery, allowed"
    }  # fmt: skip
    for name, twin in ((GREEDY, "greedy, allowed"), (RECOVERY, "recovery, allowed"), (SAMPLED, "sampled, banned")):
        sampling, other = groups[name].sampling, groups[twin].sampling
        assert sampling.ban_deleted != other.ban_deleted
        assert sampling.model_copy(update={"ban_deleted": other.ban_deleted}) == other
    assert groups["recovery, allowed"].forced_prefixes == groups[RECOVERY].forced_prefixes
    without = groups_of(rollout=RolloutSettings(backspace=False), ban_deleted="both")
    assert [each.name for each in without] == [SAMPLED, GREEDY, RECOVERY]
    assert not any(each.sampling.backspace or each.sampling.ban_deleted for each in without)


def batch_of(text: str) -> pa.RecordBatch:
    return pa.record_batch({"actions": [[1, 2], [3]], "task": [text, text]})


def test_kept_rollouts_come_back_and_damaged_ones_do_not(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    kept = KeptRollouts(tmp_path, console)
    assert kept.find("a") is None
    for key in "abc":
        kept.keep(key, batch_of(key))
    flipped, short = (next((tmp_path / "rollouts").glob(f"{key}-*.arrow")) for key in "bc")
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-10])
    assert kept.find("a") == batch_of("a")
    assert kept.find("b") is None
    assert kept.find("c") is None
    assert console.export_text().count("are damaged: they are made anew") == 2
    assert not flipped.exists()
    kept.keep("b", batch_of("again"))
    assert kept.find("b") == batch_of("again")


def test_keys_tell_apart_all_that_determines_rollouts() -> None:
    contract = TASK.contract()
    groups = groups_of(ban_deleted="both", decoding=("top_p=0.9", "contrastive", "contrastive=4:0.6"))
    keys = [rollouts_key("w", each, contract, 20, 0) for each in groups]
    keys += [
        rollouts_key("other", groups[0], contract, 20, 0),
        rollouts_key("w", groups[0], contract, 21, 0),
        rollouts_key("w", groups[0], contract, 20, 1),
        rollouts_key("w", groups[0], dataclasses.replace(contract, backspace_id=1), 20, 0),
        rollouts_key("w", groups_of(rollout=RolloutSettings(max_new_tokens=6, max_actions=9))[0], contract, 20, 0),
        rollouts_key("w", groups_of(seed=5)[-1], contract, 20, 0),  # other tokens are forced
    ]
    assert len(set(keys)) == len(keys)
    assert rollouts_key("w", groups_of()[0], contract, 20, 0) == keys[0]


def test_the_digest_is_of_weights_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    first = weights_digest(tmp_path)
    (tmp_path / "trainer_state.json").write_text("1")
    assert weights_digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"12346")
    assert weights_digest(tmp_path) != first
