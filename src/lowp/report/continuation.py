"""What a model writes after a prompt, and how fast: a figure says how much was lost, a text shows it.

At temperature 0 each token is the most likely one (greedy). Above it tokens are drawn from softmax(logits / temperature) with
a seed: two models that agree draw the same text, so the place where the texts part shows where the models do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import MisfitError


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model wrote.

    Args:
        prompt, text: what it was given, and what it added. tokens: how many it added. seconds: for the prompt and them.
    """

    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second, the reading of the prompt included."""
        return self.tokens / max(self.seconds, 1e-9)


@torch.no_grad()
def continuation(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> Continuation:
    """Continue a prompt with a Hugging Face causal language model.

    Args:
        temperature: 0 for the most likely tokens, above 0 to draw them. seed: of the draw; nothing else is touched by it.

    Raises:
        MisfitError: an empty prompt, a negative temperature, no tokens asked for, a prompt that fills the context.
    """
    ids = _prompt_ids(model, tokenizer, prompt, max_new_tokens, temperature)
    sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    with torch.random.fork_rng(_cuda_devices(model)):
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
        added = out[0, ids.shape[1] :].tolist()  # waits for the device
        seconds = time.perf_counter() - start
    text = tokenizer.decode(added, skip_special_tokens=True)
    return Continuation(prompt=prompt, text=text, tokens=len(added), seconds=seconds)


def _prompt_ids(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float) -> torch.Tensor:
    if max_new_tokens < 1:
        raise MisfitError(f"--max-new-tokens wants at least 1, got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise MisfitError(f"--temperature wants 0 (greedy) or a positive number such as 0.7, got {temperature}.")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise MisfitError("a prompt of at least one token is wanted, got an empty one: --prompt 'The '.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and ids.shape[1] + max_new_tokens > longest:
        raise MisfitError(
            f"the model reads {longest} tokens at most, got {ids.shape[1]} of the prompt and {max_new_tokens} new "
            "ones: shorten one of them."
        )
    return ids.to(next(model.parameters()).device)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
