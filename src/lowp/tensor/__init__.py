"""Floor 3: the one tensor subclass, `QTensor`, and its rules."""

from . import rules as _rules  # noqa: F401  (registers the rules)
from .qtensor import QTensor

__all__ = ["QTensor"]
