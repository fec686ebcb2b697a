"""What a node of an exported graph is: a convolution, a batch norm, a size. Backends ask before they rewrite a graph.

Source of the operators: torch's native functions, https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

aten = torch.ops.aten
_CONV = {
    getattr(aten, f"conv{dims}d").__getattr__(overload) for dims in (1, 2, 3) for overload in ("default", "padding")
}
_CONV_TRANSPOSE = {
    aten.conv_transpose1d.default, aten.conv_transpose1d,
    aten.conv_transpose2d.input, aten.conv_transpose2d,
    aten.conv_transpose3d.input, aten.conv_transpose3d,
}  # fmt: skip
_BATCH_NORM = {
    aten.batch_norm.default, aten.native_batch_norm.default, aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
}  # fmt: skip
_SIZE = {aten.sym_size.default, aten.sym_size.int, aten.sym_numel.default}


def calls(node: Node, operators: Iterable[object]) -> bool:
    """Whether a node calls one of these."""
    return node.op == "call_function" and node.target in operators


def is_conv_node(n: Node) -> bool:
    """Whether a node is a convolution over 1 to 3 axes, transposed ones not counted."""
    return calls(n, _CONV)


def is_conv_transpose_node(n: Node) -> bool:
    """Whether a node is a transposed convolution over 1 to 3 axes."""
    return calls(n, _CONV_TRANSPOSE)


def is_conv_or_conv_transpose_node(n: Node) -> bool:
    """Whether a node is a convolution of either kind."""
    return is_conv_node(n) or is_conv_transpose_node(n)


def is_bn_node(n: Node) -> bool:
    """Whether a node is a batch norm."""
    return calls(n, _BATCH_NORM)


def is_sym_size_node(node: Node) -> bool:
    """Whether a node asks for the size of a tensor that is known only when the graph runs."""
    return calls(node, _SIZE)


def filter_sym_size_users(node: Node) -> list[Node]:
    """The users of a node that look at its numbers, those that ask for its size left out."""
    return [user for user in node.users if not is_sym_size_node(user)]
