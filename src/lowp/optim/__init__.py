"""Optimizers whose states are QTensors: `lowp.optim.AdamW(params, state="dyn8/1x256")`. See `base.py` and `lowp.ops.update`."""

from .adam import Adam, Adam4bit, Adam8bit, AdamFp8, AdamW, AdamW4bit, AdamW8bit, AdamWFp8
from .load import to_torch
from .momentum import SGD, Lion, Lion4bit, Lion8bit, SGD4bit, SGD8bit
from .muon import Muon
from .offload import CPUOffloadOptimizer

__all__ = [
    "SGD",
    "Adam",
    "Adam4bit",
    "Adam8bit",
    "AdamFp8",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "CPUOffloadOptimizer",
    "Lion",
    "Lion4bit",
    "Lion8bit",
    "Muon",
    "SGD4bit",
    "SGD8bit",
    "to_torch",
]
