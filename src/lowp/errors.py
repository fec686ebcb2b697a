"""The errors of lowp, and how to read them.

Every message says three things: what was wanted, what came, what to do. The tree is small on purpose, so that a caller can
catch exactly what it can repair:

    LowpError
    ├── SpellingError       a format, scheme, rule, method or kernel name that does not exist (also a ValueError)
    ├── MisfitError         a tensor or layer that cannot take a format: shape, dtype, NaN (also a ValueError)
    ├── QuantizedError      the weight is in low precision already (also a ValueError)
    ├── KernelError         no kernel can run, or strict mode refuses the slow one (also a RuntimeError)
    ├── TensorRuleError     an operation that a quantized tensor does not have (also a NotImplementedError)
    ├── TrainingError       a loss is NaN or infinite (also an ArithmeticError)
    └── CheckpointError     files that are missing, truncated, altered or foreign (also a ValueError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 24  # known names that an error lists


class LowpError(Exception):
    """Base of all errors raised on purpose by lowp."""


class SpellingError(LowpError, ValueError):
    """A name that is not known. `SpellingError.of` adds the nearest known ones."""

    @classmethod
    def of(cls, what: str, got: str, known: Iterable[str]) -> SpellingError:
        """An error that names the nearest known spellings.

        >>> str(SpellingError.of("element", "int44", ["int4", "e4m3"]))
        "unknown element 'int44': did you mean 'int4'? Known: e4m3, int4"
        """
        names = sorted(set(known))
        near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
        hint = f": did you mean {' or '.join(repr(name) for name in near)}?" if near else "."
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return cls(f"unknown {what} {got!r}{hint} Known: {', '.join(names[:_SHOWN])}{more}")


class MisfitError(LowpError, ValueError):
    """A tensor or layer cannot take the format asked for."""


class QuantizedError(LowpError, ValueError):
    """A weight that is quantized already was asked to be quantized again."""


class KernelError(LowpError, RuntimeError):
    """No kernel can run this case, or strict mode refuses the one that can."""


class TensorRuleError(LowpError, NotImplementedError):
    """A quantized tensor has no rule for this operation."""


class TrainingError(LowpError, ArithmeticError):
    """A loss is NaN or infinite; the message names the layer where numbers first were."""


class CheckpointError(LowpError, ValueError):
    """A checkpoint is missing, truncated, altered or not ours."""
