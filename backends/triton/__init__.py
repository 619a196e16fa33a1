"""The triton backend: kernels for GPUs, generated as readable Python files."""
