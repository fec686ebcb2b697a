"""The kernels for CPUs, in C++: `native/` is compiled when lowp is installed, `library.py` loads it, `planes.py` speaks for it."""
