"""The loss over selected tokens."""
