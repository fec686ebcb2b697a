"""The kernels for CPUs, in C++: `native/` is compiled on installation, `library.py` loads it, `planes.py` speaks for it."""
