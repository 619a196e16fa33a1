"""A package apart from moec that brings an op, a pass and a backend."""
