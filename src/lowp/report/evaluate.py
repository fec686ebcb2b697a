"""How much a model lost: perplexity, KL divergence and top-1 agreement against the original, on a text.

A text of n tokens t_0 .. t_{n-1} is read in windows of `window` tokens, each starting `stride` after the one before; the last
is moved back so that it ends with the text. Every token but t_0 is scored exactly once, in the first window that holds it:
from the second window on with at least `window - stride` tokens of context. So all tokens count alike, N = n - 1, and

    perplexity   exp( -1/N sum_i log q(t_i | context_i) )
    KL           1/N sum_i sum_v p(v | context_i) (log p(v | context_i) - log q(v | context_i))     nats a token
    top-1        the share of the N positions where p and q have the same most likely token

with p the original model and q the quantized one. No special tokens are added to the text. Log-softmax is computed in float32
and sums are kept in float64; both models read a batch of windows, then its logits are dropped. Nothing is random.

KL says more than perplexity: it is zero only where both models say the same, and it does not reward a lucky guess.

Sources: Jelinek et al. 1977 (perplexity); Hugging Face, "Perplexity of fixed-length models" (strided windows); llama.cpp's
`perplexity --kl-divergence` (the same three measures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError

_LOGITS_AT_ONCE = 2**25  # 128 MiB of float32 a model: 10 windows of 512 tokens over 6144 words, or one over 64k
_POSITIONS_AT_ONCE = 1024  # bounds the float32 copies made by log-softmax


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a model lost on a text.

    Args:
        tokens: how many were scored. perplexity: of the quantized model. original_perplexity: of the one it came from.
        kl: nats a token. top1: share of positions with the same most likely token, 0 to 1.
    """

    tokens: int
    perplexity: float
    original_perplexity: float
    kl: float
    top1: float

    @property
    def ratio(self) -> float:
        """Perplexity over the original's."""
        return self.perplexity / self.original_perplexity


@dataclass(frozen=True, kw_only=True)
class Window:
    """The tokens [start, stop) that are read together; those from `first` on are scored."""

    start: int
    stop: int
    first: int


def windows(count: int, window: int, stride: int) -> list[Window]:
    """Windows over `count` tokens that score each token but the first exactly once.

    >>> [(w.start, w.stop, w.first) for w in windows(10, 4, 3)]
    [(0, 4, 1), (3, 7, 4), (6, 10, 7)]
    """
    check_windows(window, stride)
    found, scored = [], 1
    for start in range(0, count, stride):
        if scored >= count:
            break
        stop = min(start + window, count)
        found.append(Window(start=max(0, stop - window), stop=stop, first=scored))
        scored = stop
    return found


def check_windows(window: int, stride: int) -> None:
    """A MisfitError unless windows of that length and stride overlap."""
    if window < 2 or not 1 <= stride < window:
        raise MisfitError(
            f"windows want at least 2 tokens and a stride below their length, got window {window} and stride {stride}: "
            "try --window 512 --stride 256."
        )


def tokens_of(tokenizer: Any, text: str, limit: int | None = None) -> Tensor:
    """The text's token ids (n,), no special tokens added; the first `limit` of them where given.

    Raises:
        MisfitError: fewer than two tokens: nothing to predict.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0][:limit]
    if len(ids) < 2:
        raise MisfitError(
            f"an evaluation wants a text of at least 2 tokens, got {len(ids)}: name a longer text, "
            "or raise the limit of tokens."
        )
    return ids


class _Sums:
    """Running sums of one model over the scored positions."""

    def __init__(self) -> None:
        self.nll = self.original_nll = self.kl = 0.0
        self.same = self.count = 0

    def add(self, logp: Tensor, logq: Tensor, target: Tensor) -> None:
        """logp, logq: (P, V) of the original and of the model, float32; target: (P,) token ids."""
        column = target[:, None]
        self.original_nll -= logp.gather(1, column).sum(dtype=torch.float64).item()
        self.nll -= logq.gather(1, column).sum(dtype=torch.float64).item()
        # A word that p rules out adds nothing, and would be 0 * (-inf - -inf) otherwise.
        terms = torch.where(logp == -math.inf, 0.0, logp.exp() * (logp - logq))
        self.kl += terms.sum(dtype=torch.float64).item()
        self.same += int((logp.argmax(-1) == logq.argmax(-1)).sum())
        self.count += len(target)

    def quality(self) -> Quality:
        return Quality(
            tokens=self.count,
            perplexity=_exp(self.nll / self.count),
            original_perplexity=_exp(self.original_nll / self.count),
            kl=max(self.kl / self.count, 0.0),
            top1=self.same / self.count,
        )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # exp(709) is float64's largest


@torch.no_grad()
def measure(
    original: nn.Module,
    models: Mapping[str, nn.Module],
    ids: Tensor,
    *,
    window: int = 512,
    stride: int = 256,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Quality]:
    """Measure models against the original on the same tokens.

    Args:
        original: a Hugging Face causal language model: called with (B, T) ids it returns `.logits` (B, T, V).
        models: what to measure, by name; the original runs once a batch, however many there are.
        ids: (n,) token ids. window, stride: see the top of this file; a window never exceeds what the models can read.
        on_batch: called after each batch with the tokens scored so far and in all.

    Raises:
        MisfitError: too few tokens, tokens outside the vocabulary, models with different vocabularies.
    """
    check_windows(window, stride)
    window = min(window, *(_longest(model, window) for model in (original, *models.values())), len(ids))
    stride = min(stride, window - 1)
    everything = (original, *models.values())
    modes = [model.training for model in everything]
    for model in everything:
        model.eval()
    sums = {name: _Sums() for name in models}
    done = 0
    for group in _batches(windows(len(ids), window, stride), window, _vocabulary(original, ids)):
        ids_BT = torch.stack([ids[w.start : w.stop] for w in group])
        reference = _scored(original, ids_BT, group)
        target = torch.cat([ids[w.first : w.stop] for w in group])
        for name, model in models.items():
            logits = reference if model is original else _scored(model, ids_BT, group)
            _add(sums[name], reference, logits, target, name)
        done += len(target)
        on_batch(done, len(ids) - 1)
    for model, mode in zip(everything, modes, strict=True):
        model.train(mode)
    return {name: one.quality() for name, one in sums.items()}


def _longest(model: nn.Module, otherwise: int) -> int:
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None) or otherwise


def _vocabulary(model: nn.Module, ids: Tensor) -> int:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max())
    if largest >= rows:
        raise MisfitError(
            f"the tokenizer gives token {largest}, the model knows {rows}: give it the tokenizer it was trained with."
        )
    return rows


def _batches(spans: list[Window], window: int, vocabulary: int) -> Iterator[list[Window]]:
    size = max(1, _LOGITS_AT_ONCE // (window * vocabulary))
    for start in range(0, len(spans), size):
        yield spans[start : start + size]


def _scored(model: nn.Module, ids_BT: Tensor, group: list[Window]) -> Tensor:
    """The logits (P, V) that predict the scored tokens: the logit at position t speaks about token t + 1."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids_BT.to(device), use_cache=False).logits
    return torch.cat([row[w.first - 1 - w.start : w.stop - 1 - w.start] for row, w in zip(logits, group, strict=True)])


def _add(sums: _Sums, reference: Tensor, logits: Tensor, target: Tensor, name: str) -> None:
    if reference.shape != logits.shape:
        raise MisfitError(
            f"{name} speaks {logits.shape[-1]} tokens, the original {reference.shape[-1]}: compare models of one vocabulary."
        )
    for start in range(0, len(target), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        logq = logits[part].float().log_softmax(-1)
        logp = reference[part].to(logits.device).float().log_softmax(-1)
        sums.add(logp, logq, target[part].to(logits.device))
