"""Floor 3: the one tensor subclass, `QTensor`, and its rules."""

from . import collectives as _collectives  # noqa: F401  (registers the rules)
from . import rules as _rules  # noqa: F401
from .qtensor import QTensor

__all__ = ["QTensor"]
