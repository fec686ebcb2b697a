"""Kernels in Triton, which comes with torch on Linux. Without it, or without a GPU, each says so."""
