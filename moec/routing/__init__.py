"""What a model's routers do: recorded on real tokens, measured, and kept as a file that passes read."""
