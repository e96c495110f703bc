"""Makes a tiny BERT with random weights in the folder layout of BAAI/bge-large-zh, where nothing can be downloaded.

The layout is that of the model's repository on huggingface.co; to serve the real model, clone that instead
(`git lfs install && git clone https://huggingface.co/BAAI/bge-large-zh`) and put handler.py into the clone.

    python examples/huggingface_embedding/make_model.py OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import shutil
import string
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
#: The first characters of the CJK block stand for the vocabulary of the real model.
CHINESE = [chr(code) for code in range(0x4E00, 0x9FA6)]


def write_vocabulary(folder: Path) -> None:
    """One token per character, as BERT splits Chinese anyway."""
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = [*SPECIAL, *string.punctuation, *letters, *(f"##{letter}" for letter in letters), *CHINESE]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def write_tokenizer(folder: Path) -> int:
    """tokenizer.json and its two companions, made from vocab.txt; returns the vocabulary's size."""
    tokenizer = BertTokenizerFast.from_pretrained(folder, do_lower_case=True, model_max_length=512)
    tokenizer.save_pretrained(folder)
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    write_json(folder / "special_tokens_map.json", {f"{name}_token": token for name, token in special.items()})
    return len(tokenizer)


def write_json(path: Path, content: object) -> None:
    """One JSON file, readable."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path, vocabulary: int) -> None:
    """config.json and pytorch_model.bin: the real model's form, with 2 layers of 32 instead of 24 of 1024."""
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config.architectures = ["BertModel"]
    torch.manual_seed(0)
    model = BertModel(config)
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", pooling)


def write_sentence_transformers_files(folder: Path) -> None:
    """What the package sentence-transformers would read; the handler does without it."""
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (path, name) in enumerate(parts)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": True})
    write_json(folder / "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "2.2.2"}})
    (folder / "README.md").write_text("A tiny model with random weights in the layout of bge-large-zh.\n")


def main() -> None:
    """Writes model and handler into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/huggingface_embedding/make_model.py OUTPUT_FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder)
    write_model(folder, write_tokenizer(folder))
    write_sentence_transformers_files(folder)
    shutil.copy(Path(__file__).with_name("handler.py"), folder)


if __name__ == "__main__":
    main()
