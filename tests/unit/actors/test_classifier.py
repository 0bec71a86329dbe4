"""A classifier as scorer: what it says of each text alone, whatever shares its batch; and models that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from actors.scoring import Answer, make_scorer
from actors.settings import ClassifierSettings

WORDS = ("pad", "unk", "good", "bad", "so", "much", "work")
TEXTS = ("good", "bad bad work", "so much good work so much", "", "unheard")
ANSWERS = [Answer("so ", text, 1, "r", True) for text in TEXTS]


def save(folder: Path, model_class: type = BertForSequenceClassification, pad: bool = True, **config: object) -> Path:
    """A classifier of random weights, far from indifferent."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = model_class(
        BertConfig(vocab_size=7, max_position_embeddings=6, initializer_range=1.0, **settings, **config)
    )
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="unk"))
    words.pre_tokenizer = Whitespace()
    named = {"unk_token": "unk", **({"pad_token": "pad"} if pad else {})}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("classifier"), id2label={0: "dull", 1: "fine", 2: "odd"})


@torch.no_grad()
def logits_alone(folder: Path, text: str) -> torch.Tensor:
    """By transformers, without a batch and without padding; the context of six tokens is all it sees."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()][:6]
    return BertForSequenceClassification.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_probability_of_a_label_is_that_of_the_text_alone(folder, batch_size):
    settings = ClassifierSettings(name="classifier", model=str(folder), label="fine", batch_size=batch_size)
    texts = [text for text in TEXTS if text]
    found = make_scorer(settings)([answer for answer in ANSWERS if answer.text])
    expected = [float(logits_alone(folder, text).softmax(-1)[1]) for text in texts]
    assert list(found) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1, "it would say the same of every text"


@pytest.mark.parametrize("at_least", [None, 0.5])
def test_a_text_without_a_token_has_no_number_in_any_company(folder, at_least):
    """Most tokenizers begin each text with a token of their own; this one does not."""
    scorer = make_scorer(ClassifierSettings(name="classifier", model=str(folder), label="fine", at_least=at_least))
    assert np.isnan(scorer(ANSWERS[3:4])).all()
    assert np.isnan(scorer(ANSWERS)).tolist() == [False, False, False, True, False]


def test_it_can_read_the_prompt_and_give_yes_or_no(folder):
    prompted = ClassifierSettings(name="classifier", model=str(folder), label="odd", with_prompt=True)
    expected = [float(logits_alone(folder, f"so {text}").softmax(-1)[2]) for text in TEXTS]
    assert list(make_scorer(prompted)(ANSWERS)) == pytest.approx(expected, abs=1e-5)
    middle = sorted(expected)[2]
    binary = prompted.model_copy(update={"at_least": middle - 1e-4})
    assert list(make_scorer(binary)(ANSWERS)) == [float(value >= middle) for value in expected]


def test_one_output_counts_as_it_is_and_labels_that_go_together_do_not_compete(tmp_path):
    reward = save(tmp_path / "reward", num_labels=1)
    found = make_scorer(ClassifierSettings(name="classifier", model=str(reward)))(ANSWERS[:1])
    assert found[0] == pytest.approx(float(logits_alone(reward, "good")[0]), abs=1e-5)
    both = save(tmp_path / "both", num_labels=2, problem_type="multi_label_classification")
    found = make_scorer(ClassifierSettings(name="classifier", model=str(both), label="LABEL_1"))(ANSWERS[:1])
    assert found[0] == pytest.approx(float(logits_alone(both, "good").sigmoid()[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("label", "made", "message"),
    [
        ("good", {"num_labels": 2}, r"has no label 'good'; it has: LABEL_0, LABEL_1"),
        (None, {"num_labels": 2}, r"has several labels, set one: LABEL_0, LABEL_1"),
        ("LABEL_0", {"num_labels": 1}, r"has one output, and no label 'LABEL_0' .*: leave label out"),
        ("LABEL_0", {"model_class": BertModel}, r"is no trained sequence classifier: .* classifier\.bias"),
        ("LABEL_0", {"pad": False}, r"has no padding token"),
    ],
)
def test_models_that_cannot_score(tmp_path, label, made, message):
    settings = ClassifierSettings(name="classifier", model=str(save(tmp_path, **made)), label=label)
    with pytest.raises(ValueError, match=message):
        make_scorer(settings)


def test_a_folder_that_holds_none_and_a_bound_without_a_meaning(tmp_path):
    with pytest.raises(ValueError, match=r"classifier '.*nothing' cannot be loaded"):
        make_scorer(ClassifierSettings(name="classifier", model=str(tmp_path / "nothing"), label="x"))
    with pytest.raises(ValueError, match=r"at_least=2 is a bound on a probability"):
        ClassifierSettings(name="classifier", model="x", label="y", at_least=2.0)
