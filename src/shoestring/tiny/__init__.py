"""The embedded default: a tiny Qwen2 model that can multiply better than it does. `make.py` made it."""
