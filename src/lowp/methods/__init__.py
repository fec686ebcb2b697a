"""Calibration methods: pure functions on a weight and its format. Each file registers itself in `lowp.quantize.METHODS`."""

import importlib
import pkgutil

for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")
