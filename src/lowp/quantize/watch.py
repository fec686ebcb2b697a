"""Watch: see what a model multiplies its weights with, whatever module does it.

A TorchFunctionMode looks at every product while the model runs. Where an operand lies in the memory of a watched weight, the
other one is what calibration wants to see. So a linear layer, GPT-2's Conv1D, a loop over a stack of experts and torch's grouped
product are caught alike, without hooks on modules that this house would have to know.

    F.linear(x, w)   torch.matmul, @, mm, bmm, addmm(b, x, w^T)   torch._grouped_mm(x, w_EKN, offs=...)

Padding is no data: where it is known which tokens are real, only their rows are shown. A row's token is known by its place in
(B, T, K) or (B T, K), and where rows of (B T, K) were picked by an index, as experts' are, by that index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .match import Target

See = Callable[[str, int, Tensor], None]  # name of the weight, which matrix of a stack (0 for a single one), x (..., K)

_LINEAR = {F.linear}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
_ADDMM = {torch.addmm, Tensor.addmm}
_GROUPED = {getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)} - {None}


class Watch(TorchFunctionMode):
    """While it is entered, `see` is called with each input of the targets' weights.

    Args:
        targets: whose weights are watched; they must have data. see: called before the product is computed.

    Attributes:
        real: (B, T), bool: which tokens are no padding; None: all.
        blind: names of weights where padding could not be told: all rows were shown.
    """

    def __init__(self, targets: Iterable[Target], see: See) -> None:
        super().__init__()
        self.see = see
        self.real: Tensor | None = None
        self.blind: set[str] = set()
        self._picked: Tensor | None = None  # of the rows that were picked last: which are real
        self.by_memory: dict[int, list[Target]] = {}
        for target in targets:
            self.by_memory.setdefault(target.weight.untyped_storage().data_ptr(), []).append(target)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LINEAR:
            self._product(args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"], False)
        elif func in _MATMUL:
            self._product(args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2")), True)
        elif func in _ADDMM and len(args) > 2:
            self._product(args[1], args[2], True)
        elif func in _GROUPED:
            self._grouped(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        elif func is Tensor.__getitem__ and self.real is not None:
            self._pick(args[0], args[1])
        return func(*args, **kwargs)

    def _product(self, x: Tensor, weight: Tensor, transposed: bool) -> None:
        target = self._target(weight)
        if target is None or not isinstance(x, Tensor):
            return
        if transposed != (weight.stride(-1) != 1 or target.kind == "conv1d") or x.shape[-1] != target.matrix_shape[-1]:
            return  # it is read along its other axis
        if weight.dim() == 3:  # one batch of tokens for each matrix
            if self.real is not None:
                self.blind.add(target.fqn)
            for index in range(weight.shape[0]):
                self.see(target.fqn, index, x[index])
            return
        matrix = target.matrix_shape[-1] * target.matrix_shape[-2]
        real = self._real(x, target)
        index = (weight.storage_offset() - target.weight.storage_offset()) // matrix
        self.see(target.fqn, index, x if real is None else x.reshape(-1, x.shape[-1])[real])

    def _grouped(self, x: Tensor, weight: Tensor, offs: Tensor | None) -> None:
        target = self._target(weight)
        if target is None or offs is None or x.shape[-1] != target.matrix_shape[-1] or weight.stride(-1) == 1:
            return
        ends = offs.tolist()
        real = self._real(x, target)
        for index, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            self.see(target.fqn, index, x[start:stop] if real is None else x[start:stop][real[start:stop]])

    def _pick(self, x: Any, index: Any) -> None:
        """Rows are picked by an index: remember which of them are real."""
        assert self.real is not None
        by_index = isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int64, torch.int32)
        if by_index and isinstance(x, Tensor) and x.dim() == 2 and len(x) == self.real.numel():
            self._picked = self.real.flatten()[index]

    def _real(self, x: Tensor, target: Target) -> Tensor | None:
        """Which rows of x (..., K), flattened, are of real tokens; None for all of them."""
        if self.real is None:
            return None
        rows, picked = x[..., 0].numel(), self._picked
        stack = len(target.matrix_shape) == 3
        if picked is not None and len(picked) == rows and (stack or rows != self.real.numel()):
            return picked
        if rows == self.real.numel() and not stack:
            return self.real.flatten()
        self.blind.add(target.fqn)
        return None

    def _target(self, weight: Any) -> Target | None:
        if not isinstance(weight, Tensor) or type(weight) not in (Tensor, torch.nn.Parameter):
            return None
        found = self.by_memory.get(weight.untyped_storage().data_ptr(), ())
        offset = weight.storage_offset()
        return next(
            (t for t in found if 0 <= offset - t.weight.storage_offset() < max(t.weight.numel(), 1)), None
        )  # several may lie in one buffer
