"""What runs inside a compiled model: the ops, the programs they carry, checks and counters."""
