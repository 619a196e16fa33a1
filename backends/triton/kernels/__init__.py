"""The text of the kernels: one file for each group of them, and what they are made with."""
