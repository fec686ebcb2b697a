"""Kernels in CUDA C++, kept as text beside their Python and compiled at first use (see `lowp.kernels.nvrtc`)."""
