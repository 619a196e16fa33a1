"""Launch parameters: what a GPU is, what a tile takes of it, how long that is, and which one is chosen."""
