"""Trains three small models that translate word by word: English to German, English to French, German to English.

Writes en_de.pt, en_fr.pt and de_en.pt: TorchScript modules that know their words. Takes a few seconds on a CPU.

    python examples/workflows/phrases/make_models.py OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Dict, List  # noqa: UP035  TorchScript knows these names only

import torch
from torch import nn

WORDS = {
    "the": ("der", "le"),
    "dog": ("hund", "chien"),
    "man": ("mann", "homme"),
    "bird": ("vogel", "oiseau"),
    "tree": ("baum", "arbre"),
    "sees": ("sieht", "voit"),
    "seeks": ("sucht", "cherche"),
    "finds": ("findet", "trouve"),
    "sings": ("singt", "chante"),
    "and": ("und", "et"),
    "here": ("hier", "ici"),
    "today": ("heute", "aujourd'hui"),
}
STEPS = 150


class WordTranslator(nn.Module):
    """Each word becomes a vector, and the vector the most likely word of the other language."""

    def __init__(self, source: list[str], target: list[str]) -> None:
        super().__init__()
        self.place: Dict[str, int] = {word: number for number, word in enumerate(source)}  # noqa: UP006
        self.target: List[str] = target  # noqa: UP006
        self.vectors = nn.Embedding(len(source), 16)
        self.words = nn.Linear(16, len(target))

    def forward(self, sentence: str) -> str:
        """The sentence in the other language; words that it does not know stay as they are."""
        translated: List[str] = []  # noqa: UP006
        for word in sentence.lower().split():
            if word in self.place:
                scores = self.words(self.vectors(torch.tensor(self.place[word])))
                translated.append(self.target[int(scores.argmax())])
            else:
                translated.append(word)
        return " ".join(translated)


def train(source: list[str], target: list[str]) -> WordTranslator:
    """A translator that has learnt all words."""
    torch.manual_seed(0)
    translator = WordTranslator(source, target)
    optimizer = torch.optim.Adam(translator.parameters(), lr=5e-2)
    every_word = torch.arange(len(source))
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(translator.words(translator.vectors(every_word)), every_word).backward()
        optimizer.step()
    return translator.eval()


def main() -> None:
    """Writes the models into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/workflows/phrases/make_models.py OUTPUT_FOLDER")
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    english = list(WORDS)
    german, french = ([words[number] for words in WORDS.values()] for number in (0, 1))
    for name, source, target in (("en_de", english, german), ("en_fr", english, french), ("de_en", german, english)):
        translator = train(source, target)
        print(f"{name}: {translator(' '.join(source[:3]))}")
        torch.jit.script(translator).save(output / f"{name}.pt")


if __name__ == "__main__":
    main()
