"""Judging a model on a task's problems."""
