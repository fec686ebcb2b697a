"""Floor 6: what quantization cost and what it gained, measured and shown.

    evaluate   perplexity, KL divergence, top-1 agreement, against the original model
    layers     error, bytes and kernel of each layer
    results    rows of `benchmarks/results/*.csv`
    bench      time of each kernel against torch's float op, correct first; `clock` takes the time, `models` knows the shapes
    tune       time of each candidate of a kernel, the fastest is kept
    page       one self-contained HTML page, with the plots of `plots`

Each measures plain models and returns records; `lowp.cli` gives them a face.
"""

from .evaluate import Quality, measure, tokens_of
from .layers import Evaluation, evaluation, layer_rows, model_bytes

__all__ = ["Evaluation", "Quality", "evaluation", "layer_rows", "measure", "model_bytes", "tokens_of"]
