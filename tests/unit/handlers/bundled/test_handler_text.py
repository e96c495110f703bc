"""The text handlers: cleaning, tokens, vocabularies, classification, explanations."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wsgi_ts.handlers.bundled.text import TextClassifier
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.testing import MockContext
from wsgi_ts.handlers.toolkit.text_utils import (
    CONTRACTION_MAP,
    Vocabulary,
    expand_contractions,
    get_tokenizer,
    load_vocabulary,
    ngrams_iterator,
)

WORDS = ["<unk>", "good", "bad", "very", "very good"]


class Bag(torch.nn.Module):
    """Class 1 for "good", class 0 for "bad"; "very good" counts double."""

    def __init__(self, mode: str = "sum") -> None:
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(len(WORDS), 2, mode=mode)
        self.embedding.weight = torch.nn.Parameter(torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 2.0]]))
        self.fc = torch.nn.Linear(2, 2, bias=False)
        self.fc.weight = torch.nn.Parameter(torch.eye(2))

    def forward(self, text: torch.Tensor, offsets: torch.Tensor) -> Any:
        return self.fc(self.embedding(text, offsets))


def classifier(mode: str = "sum") -> TextClassifier:
    handler = TextClassifier()
    handler.device = torch.device("cpu")
    handler.model = Bag(mode)
    handler.mapping = {"0": "negative", "1": "positive"}
    handler.source_vocab = Vocabulary({word: index for index, word in enumerate(WORDS)})
    return handler


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Install it using pip, now!", ["install", "it", "using", "pip", ",", "now", "!"]),
        ("a<br />b; c: d", ["a", "b", "c", "d"]),
        ('He said "no" (twice).', ["he", "said", "no", "(", "twice", ")", "."]),
        ("it's", ["it", "'", "s"]),
        ("", []),
    ],
)
def test_basic_english(text: str, tokens: list[str]) -> None:
    assert get_tokenizer("basic_english")(text) == tokens


def test_other_tokenizers() -> None:
    assert get_tokenizer(None)("A  b.") == ["A", "b."]
    assert get_tokenizer(list)("ab") == ["a", "b"]
    with pytest.raises(ValueError, match='"basic_english"'):
        get_tokenizer("spacy")
    with pytest.raises(ValueError, match="English"):
        get_tokenizer("basic_english", "de")


def test_ngrams_come_after_the_tokens() -> None:
    assert list(ngrams_iterator(["a", "b", "c"], 3)) == ["a", "b", "c", "a b", "b c", "a b c"]
    assert list(ngrams_iterator(["a"], 2)) == ["a"]
    assert list(ngrams_iterator([], 2)) == []


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("I don't, but she's HERE", "I do not, but she is HERE"),
        ("Can't you?", "Cannot you?"),
        ("We\u2019ll see; won't we", "We will see; will not we"),
        ("the dog's bone", "the dogs bone"),
        ("shed well were", "shed well were"),
    ],
)
def test_contractions(text: str, expanded: str) -> None:
    assert expand_contractions(text) == expanded


def test_every_contraction_is_expanded_whole() -> None:
    for contraction, expanded in CONTRACTION_MAP.items():
        assert expand_contractions(f"x {contraction} y") == f"x {expanded} y"


def test_vocabularies_of_every_form(tmp_path: Path) -> None:
    index = {word: number for number, word in enumerate(WORDS)}
    (tmp_path / "a.json").write_text(json.dumps(index))
    (tmp_path / "b.json").write_text(json.dumps(WORDS))
    (tmp_path / "c.txt").write_text("\n".join(WORDS) + "\n")
    torch.save(index, tmp_path / "d.pt")
    torch.save(collections.OrderedDict(index), tmp_path / "e.pt")
    torch.save(WORDS, tmp_path / "f.pt")
    for path in tmp_path.iterdir():
        vocabulary = load_vocabulary(path)
        assert vocabulary == index, path
        assert vocabulary["never seen"] == 0
    assert Vocabulary({"a": 0, "<unk>": 7})["b"] == 7


class Stoi:
    """Looks like torchtext's vocabulary."""

    def get_stoi(self) -> dict[str, int]:
        return {"a": 0}


def test_a_pickled_vocabulary_is_read_only_when_allowed(tmp_path: Path) -> None:
    torch.save(Stoi(), tmp_path / "source_vocab.pt")
    with pytest.raises(ValueError, match="get_stoi"):
        load_vocabulary(tmp_path / "source_vocab.pt")
    assert load_vocabulary(tmp_path / "source_vocab.pt", weights_only=False) == {"a": 0}


@pytest.mark.parametrize("content", ["5", '{"a": "b"}', "[1]", '{"a": -1}', "no json"])
def test_other_vocabularies_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=r"The vocabulary v\.json"):
        load_vocabulary(tmp_path / "v.json")


def test_where_the_vocabulary_is_looked_for(tmp_path: Path) -> None:
    context = MockContext(model_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"source_vocab\.pt or .*--extra-files"):
        TextClassifier().get_source_vocab_path(context)
    (tmp_path / "source_vocab.txt").touch()
    (tmp_path / "words.pt").touch()
    assert TextClassifier().get_source_vocab_path(context) == str(tmp_path / "source_vocab.txt")
    assert context.manifest is not None
    context.manifest["model"]["sourceVocab"] = "/training/words.pt"
    assert TextClassifier().get_source_vocab_path(context) == str(tmp_path / "words.pt")


def test_a_batch_of_texts_is_classified() -> None:
    rows = [
        {"data": "<b>Very</b> good!"},
        {"body": b"b\xc3\xa1d &amp; bad"},
        {"body": ""},
        {"body": bytearray(b"good")},
    ]
    answers = classifier().handle(rows, MockContext())
    assert [list(answer) for answer in answers] == [["negative", "positive"]] * 4
    bags = torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    expected = torch.softmax(bags, dim=1).tolist()
    assert [list(answer.values()) for answer in answers] == [pytest.approx(row) for row in expected]


def test_a_row_without_text_is_the_clients_fault() -> None:
    with pytest.raises(PredictionException, match="Send the text") as caught:
        classifier().preprocess([{"body": {"a": 1}}])
    assert caught.value.error_code == 400


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_explanations_weigh_the_words(mode: str) -> None:
    handler = classifier(mode)
    batch = handler.preprocess([{"body": "very good"}, {"body": "bad stuff"}])
    first, second = handler.get_insights(batch, None, [1, 0])
    assert first["words"] == ["very", "good", "very good"]
    # Linear in the words' vectors, so that the attributions are exactly 0, 1 and 2, scaled to a norm of 1.
    assert first["importances"] == pytest.approx([0, 5**-0.5, 2 * 5**-0.5], abs=1e-5)
    assert second["words"] == ["bad", "stuff", "bad stuff"]
    assert second["importances"] == pytest.approx([1, 0, 0], abs=1e-5)


def test_what_cannot_be_explained_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = classifier()
    batch = handler.preprocess([{"body": "good"}])
    handler.model = torch.nn.Linear(2, 2)
    with pytest.raises(PredictionException, match="EmbeddingBag") as caught:
        handler.get_insights(batch, None)
    assert caught.value.error_code == 501
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(PredictionException, match="captum") as caught:
        handler.get_insights(batch, None)
    assert caught.value.error_code == 501


def test_helpers_of_derived_handlers() -> None:
    handler = classifier()
    assert handler._remove_puncutation("a,b.") == handler._remove_punctuation("a,b.") == "ab"

    class Tokenizer:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["\u0120good" if number else "bad" for number in ids]

    assert handler.get_word_token([1, 0], Tokenizer()) == ["good", "bad"]
    assert handler.get_word_token(["\u0120good", "bad"]) == ["good", "bad"]
    assert handler.summarize_attributions(torch.zeros(1, 2, 3)).tolist() == [0, 0]
