"""What the handlers of this folder share: requests become prompts, prompts become text. Tokens are bytes.

    {"prompt": "Once upon"}                              -> {"text": "…", "tokens": […], "logprobs": […]}
    {"prompt": "A", "max_new_tokens": 20, "stream": true}  -> one such JSON line per token

The tokens are chosen without chance: under tensor parallelism every rank chooses, and all have to choose the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException

PAD = 256


class Prompt(NamedTuple):
    """What one request asks for."""

    tokens: list[int]
    new_tokens: int
    stream: bool


class Generated(NamedTuple):
    """What was made of one prompt: tokens, and how likely the model found each of them."""

    tokens: list[int]
    logprobs: list[float]

    def as_json(self) -> dict[str, Any]:
        """The answer."""
        text = bytes(token for token in self.tokens if token < PAD).decode("utf-8", errors="replace")
        return {"text": text, "tokens": self.tokens, "logprobs": self.logprobs}


def answer(model: Any, data: list[dict[str, Any]], context: Any, device: Any) -> list[Any]:
    """Answers a batch: what `handle` returns. Where all requests ask for it, tokens are sent as they are made."""
    max_length = context.model_yaml_config.get("handler", {}).get("max_length", 80)
    prompts = [read_prompt(row.get("body", row.get("data")), max_length) for row in data]
    send: Callable[[list[Generated]], None] | None = None
    if all(prompt.stream for prompt in prompts):

        def send(step: list[Generated]) -> None:
            lines = [json.dumps(piece.as_json()) + "\n" if piece.tokens else "" for piece in step]
            send_intermediate_predict_response(lines, context.request_ids, "", 200, context)

    results = generate(model, prompts, device, send)
    return ["" if send else result.as_json() for result in results]


def read_prompt(body: Any, max_length: int) -> Prompt:
    """Reads a request; raises PredictionException, which answers 400, for what is none."""
    if isinstance(body, bytes | bytearray | str):
        try:
            body = json.loads(body)
        except ValueError:
            raise PredictionException("The body is not JSON.", 400) from None
    prompt = body.get("prompt") if isinstance(body, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise PredictionException('Send {"prompt": "some text"}.', 400)
    new_tokens = body.get("max_new_tokens", 16)
    if not isinstance(new_tokens, int) or not 1 <= new_tokens <= 256:
        raise PredictionException("max_new_tokens should be a number from 1 to 256.", 400)
    return Prompt(list(prompt.encode())[:max_length], new_tokens, bool(body.get("stream", False)))


@torch.inference_mode()
def generate(
    model: Any, prompts: list[Prompt], device: Any, send: Callable[[list[Generated]], None] | None = None
) -> list[Generated]:
    """Continues all prompts at once, always with the likeliest token.

    The keys and values of former tokens are kept: of a model in stages, by each stage for its own layers.
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    # Padded on the left, so that each row's last token is in the last column.
    padding = [longest - len(prompt.tokens) for prompt in prompts]
    ids = torch.tensor(
        [[PAD] * pad + prompt.tokens for pad, prompt in zip(padding, prompts, strict=True)], device=device
    )
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device)
    results = [Generated([], []) for _ in prompts]
    cache = None
    for step in range(max(prompt.new_tokens for prompt in prompts)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logprobs, chosen = output.logits[:, -1].float().log_softmax(-1).max(-1)
        pieces = [
            Generated([token], [logprob]) if step < prompt.new_tokens else Generated([], [])
            for prompt, token, logprob in zip(prompts, chosen.tolist(), logprobs.tolist(), strict=True)
        ]
        for result, piece in zip(results, pieces, strict=True):
            result.tokens.extend(piece.tokens)
            result.logprobs.extend(piece.logprobs)
        if send is not None:
            send(pieces)
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return results
