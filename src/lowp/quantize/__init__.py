"""Floor 4: the model. Rules say which layer gets which scheme; `quantize_` carries them out and reports what it did."""

from .apply import Report, ReportRow, dequantize_, quantize_
from .match import Plan, PlanRow, plan
from .method import METHODS, Method
from .weight import quantize_weight

__all__ = [
    "METHODS",
    "Method",
    "Plan",
    "PlanRow",
    "Report",
    "ReportRow",
    "dequantize_",
    "plan",
    "quantize_",
    "quantize_weight",
]
