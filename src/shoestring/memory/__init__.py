"""The memory plan: what a run needs, before it starts."""
