"""Backends: who executes the ops of the ``moe`` dialect. One folder a backend; registry and partition beside them."""
