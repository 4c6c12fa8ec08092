"""The memory plan by its public name (`shoestring.memory.plan`)."""

from shoestring.memory.plan import Phase, Plan, predict

__all__ = ["Phase", "Plan", "predict"]
