"""How models are named."""

from dataclasses import dataclass


@dataclass
class LoRAModulePath:
    """A LoRA adapter."""

    name: str
    path: str
