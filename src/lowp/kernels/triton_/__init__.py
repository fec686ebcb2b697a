"""Kernels in Triton: compiled at first use for the device at hand, from one text for all of them.

With TRITON_INTERPRET=1 in the environment before Triton is imported the same text runs on CPU tensors, line by line in NumPy:
that is how the tests check it without a GPU. It is a way to test, far too slow to serve, so no kernel's `why_not` knows of it.
"""

import os


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"
