"""Floor 2: compute. Plain tensors in, plain tensors out.

An op is one file here: its contract and its reference, the meaning of the op in a few lines of torch. A kernel is one file
under `kernels/`: it says which cases it can run and runs them. `pick` chooses, by what is fixed when a graph is traced.
"""

from .cast import cast, cast_both, cast_codes_as, cast_interleaved, fake_cast
from .columns import round_columns
from .embedding import embedding
from .fake_quantize import fake_quantize, fake_quantize_given
from .grouped import grouped
from .grouped_product import grouped_product
from .linear import linear
from .matmul import matmul
from .product import product
from .registry import Case, Kernel, all_ops, best_layout, device_of, explain, kernels_of, pick, strict
from .update import adam, lion, muon, sgd

__all__ = [
    "Case",
    "Kernel",
    "adam",
    "all_ops",
    "best_layout",
    "cast",
    "cast_both",
    "cast_codes_as",
    "cast_interleaved",
    "device_of",
    "embedding",
    "explain",
    "fake_cast",
    "fake_quantize",
    "fake_quantize_given",
    "grouped",
    "grouped_product",
    "kernels_of",
    "linear",
    "lion",
    "matmul",
    "muon",
    "pick",
    "product",
    "round_columns",
    "sgd",
    "strict",
]
