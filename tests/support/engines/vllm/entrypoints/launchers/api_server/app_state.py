"""What the application needs to know."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


async def init_app_state(
    engine_client: Any, state: Any, args: argparse.Namespace, supported_tasks: tuple[Any, ...]
) -> None:
    """Fills the application's state."""
    assert supported_tasks == await engine_client.get_supported_tasks()
    state.engine = engine_client
    shown = {"max_model_len": engine_client.model_config.max_model_len, "max_num_seqs": args.max_num_seqs}
    if args.chat_template:
        shown["chat_template"] = Path(args.chat_template).read_text()
    state.models = [{"id": name, "object": "model", "root": args.model, **shown} for name in args.served_model_name]
    state.models += [{"id": lora.name, "object": "model", "root": lora.path} for lora in args.lora_modules or ()]
