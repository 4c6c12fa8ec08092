"""Our own layers and decode step over the model's weights."""
