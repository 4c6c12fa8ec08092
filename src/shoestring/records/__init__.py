"""What a run writes: metrics, logs, pages."""
