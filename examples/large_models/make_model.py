"""Makes a small Llama or GPT-2 with random weights, as a folder that transformers loads. Its tokens are bytes.

    python examples/large_models/make_model.py llama|gpt2 OUTPUT_FOLDER

What such a model writes makes no sense. The folder of a real one takes its place, with its tokenizer in
text_generation.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

#: Of all models here: bytes, and two tokens more than there are.
COMMON: dict[str, Any] = {"vocab_size": 258, "pad_token_id": 256, "bos_token_id": None, "eos_token_id": 257}


def make_model(kind: str) -> LlamaForCausalLM | GPT2LMHeadModel:
    """A model of that kind; the same one each time. Its weights are large enough for tokens to differ."""
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**COMMON, **sizes, **heads, initializer_range=0.2))
    return GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=64, n_layer=6, n_head=4, n_positions=512, initializer_range=0.2))


def main() -> None:
    """Writes the model named on the command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("llama", "gpt2"):
        sys.exit("usage: python examples/large_models/make_model.py llama|gpt2 OUTPUT_FOLDER")
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    make_model(sys.argv[1]).save_pretrained(folder)


if __name__ == "__main__":
    main()
