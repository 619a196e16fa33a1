"""Ahead-of-time compilation: an exported program becomes a ``.moec`` artifact that runs without the model's code."""
