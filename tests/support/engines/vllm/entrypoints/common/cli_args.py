"""The command line of `vllm serve`."""

import argparse


def make_arg_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the arguments of the server and of the engine."""
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--max-model-len", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--chat-template")
    parser.add_argument("--lora-modules", nargs="+")
    parser.add_argument("--enable-lora", action="store_true")
    return parser
