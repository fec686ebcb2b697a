"""Kernels: one stem a kernel, found by listing the folders. `torch_` holds those that torch itself ships."""
