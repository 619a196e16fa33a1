"""Kernels as binaries: compiled for a GPU that need not be here, read, kept, and launched through its driver."""
