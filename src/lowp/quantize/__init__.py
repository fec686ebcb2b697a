"""Floor 4: the model. Rules say which layer gets which scheme; `quantize_` carries them out and reports what it did."""

from .apply import Report, ReportRow, dequantize_, quantize_, quantize_weight
from .match import Plan, PlanRow, plan
from .method import METHODS, Method

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
