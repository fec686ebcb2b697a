"""Kernels in Triton: compiled at first use for the device at hand, from one text for all of them.

With TRITON_INTERPRET=1 in the environment before Triton is imported the same text runs on CPU tensors, line by line in NumPy:
that is how the tests check it without a GPU. It is a way to test, far too slow to serve, so no kernel's `why_not` knows of it.
"""

import os

from ...ops.registry import Case


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_portable(case: Case) -> str:
    """Empty, or one sentence why the kernels of floats, which ask nothing of the chip but bf16 tensor cores, do not run here."""
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    if case.sm < 80:
        return f"wants sm80, got sm{case.sm}"
    if case.dtype not in ("bfloat16", "float16", "float32"):
        return f"wants bfloat16, float16 or float32, got {case.dtype}"
    return ""
