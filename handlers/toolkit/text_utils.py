"""Text in small pieces: tokens, n-grams, contractions, vocabularies. No torch unless a `.pt` vocabulary is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Tokenizer = Callable[[str], list[str]]

#: The token that stands for all words that a vocabulary lacks.
UNKNOWN_TOKEN = "<unk>"

_ENDINGS = {"'ll": "will", "'d": "would", "'ve": "have"}
_QUESTIONS = ("who", "what", "how", "where", "why")
_ARE = ("you", "we", "they", "there", *_QUESTIONS)
_IS = ("he", "she", "it", "that", "this", "there", "when", *_QUESTIONS)
_SUBJECTS = ("i", "you", "we", "they", *_IS)
_NEGATED = (
    *("are", "could", "dare", "did", "do", "does", "had", "has", "have", "is"),
    *("might", "must", "need", "ought", "should", "was", "were", "would"),
)
_IRREGULAR = {
    "i'm": "i am",
    "ain't": "is not",
    "can't": "cannot",
    "won't": "will not",
    "shan't": "shall not",
    "let's": "let us",
    "ma'am": "madam",
    "o'clock": "of the clock",
    "y'all": "you all",
    "'cause": "because",
}


def _contractions() -> dict[str, str]:
    expanded = {subject + ending: f"{subject} {word}" for subject in _SUBJECTS for ending, word in _ENDINGS.items()}
    expanded |= {f"{subject}'re": f"{subject} are" for subject in _ARE}
    expanded |= {f"{subject}'s": f"{subject} is" for subject in _IS}
    expanded |= {f"{verb}n't": f"{verb} not" for verb in _NEGATED}
    expanded |= {f"{verb}'ve": f"{verb} have" for verb in ("could", "might", "must", "should", "would")}
    return expanded | _IRREGULAR


#: Contraction -> what it stands for, both in lower case.
CONTRACTION_MAP = _contractions()

# The longest first, so that "could've" is not read as something shorter that it begins with.
_CONTRACTION = re.compile(
    r"(?<!\w)(?:" + "|".join(sorted(map(re.escape, CONTRACTION_MAP), key=len, reverse=True)) + r")(?!\w)", re.IGNORECASE
)
_PUNCTUATION = re.compile(r"(['.,()!?])")
_SEPARATOR = re.compile(r"<br\s*/?>|[;:]")


def expand_contractions(text: str) -> str:
    """Writes contractions out ("Don't" -> "Do not") and drops the apostrophes that are left."""

    def expand(match: re.Match[str]) -> str:
        found = match.group(0).replace("\u2019", "'")
        expanded = CONTRACTION_MAP[found.lower()]
        return expanded[0].upper() + expanded[1:] if found[0].isupper() else expanded

    return _CONTRACTION.sub(expand, text.replace("\u2019", "'")).replace("'", "")


def basic_english(text: str) -> list[str]:
    """Returns lower-case words and punctuation marks; quotes, colons and semicolons are dropped.

    These are the tokens that torchtext's `basic_english` gives, which models in use were trained with.
    """
    text = _SEPARATOR.sub(" ", text.lower()).replace('"', "")
    return _PUNCTUATION.sub(r" \1 ", text).split()


def get_tokenizer(tokenizer: str | Tokenizer | None, language: str = "en") -> Tokenizer:
    """Returns the function that cuts a text into tokens.

    Args:
        tokenizer: "basic_english"; None to cut at blanks; or a function, which is returned as it is.
        language: only "en" for "basic_english".

    Raises:
        ValueError: another name or language.
    """
    if tokenizer is None:
        return str.split
    if callable(tokenizer):
        return tokenizer
    if tokenizer != "basic_english":
        raise ValueError(f'Unknown tokenizer "{tokenizer}": use "basic_english", None, or a function of a text.')
    if language != "en":
        raise ValueError(f'The tokenizer basic_english is for English ("en"), not for "{language}".')
    return basic_english


def ngrams_iterator(token_list: Sequence[str], ngrams: int) -> Iterator[str]:
    """Yields the tokens, then the pairs of neighbours joined by a blank, then the triples, up to `ngrams` tokens."""
    yield from token_list
    for length in range(2, ngrams + 1):
        for start in range(len(token_list) - length + 1):
            yield " ".join(token_list[start : start + length])


class Vocabulary(dict[str, int]):
    """Token -> index. A token that is not in it has the index of `<unk>`, or 0 where there is no `<unk>`."""

    def __missing__(self, token: str) -> int:
        return self.get(UNKNOWN_TOKEN, 0)


def load_vocabulary(path: str | Path, *, weights_only: bool = True) -> Vocabulary:
    """Reads a vocabulary: an object token -> index, or a list of tokens by their index.

    Args:
        path: a `.json` file, a `.txt` file with a token per line, or anything else for `torch.load`.
        weights_only: whether torch.load may only read plain data; where not, torchtext's `Vocab` is read, too.

    Raises:
        ValueError: the file cannot be read so, or holds something else; the text says what to do.
    """
    path = Path(path)
    try:
        content = _read(path, weights_only)
    except Exception as error:
        raise ValueError(
            f"The vocabulary {path.name} cannot be read: {error}. A pickled torchtext Vocab is refused while weights "
            f"are loaded as weights only: save vocab.get_stoi() instead, or write a .json or .txt file."
        ) from error
    get_stoi = getattr(content, "get_stoi", None)
    if get_stoi is not None:
        content = get_stoi()
    if isinstance(content, Mapping):
        return _checked(path, content.items())
    if isinstance(content, (list, tuple)):
        return _checked(path, ((token, index) for index, token in enumerate(content)))
    raise ValueError(
        f"The vocabulary {path.name} holds a {type(content).__name__}: make it an object token -> index, or a list."
    )


def _read(path: Path, weights_only: bool) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").splitlines()
    import torch

    return torch.load(path, map_location="cpu", weights_only=weights_only)


def _checked(path: Path, items: Iterable[tuple[Any, Any]]) -> Vocabulary:
    vocabulary = Vocabulary()
    for token, index in items:
        if not isinstance(token, str) or not isinstance(index, int) or index < 0:
            raise ValueError(f"The vocabulary {path.name} has {token!r}: {index!r}, not a token and its index.")
        vocabulary[token] = index
    return vocabulary
