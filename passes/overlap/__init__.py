"""The pass ``overlap``: a layer in chunks, so that links and experts work at the same time."""
