"""Kernels built from torch's own operators: nothing to compile, and visible to torch.compile and torch.export."""
