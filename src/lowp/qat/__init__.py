"""Quantization-aware training: prepare a model, train it, convert it."""

from .convert import convert, disable, enable, prepare, start_after
from .fake import FakeQuantize
from .learn import LearnedQuantize, LearnedRange
from .lora import Lora
from .loss import distill

__all__ = [
    "FakeQuantize",
    "LearnedQuantize",
    "LearnedRange",
    "Lora",
    "convert",
    "disable",
    "distill",
    "enable",
    "prepare",
    "start_after",
]
