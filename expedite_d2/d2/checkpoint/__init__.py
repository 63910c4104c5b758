"""Public checkpoints' names and files, and this project's own."""

from expedite_d2.d2.checkpoint.loading import load_weights

__all__ = ["load_weights"]
