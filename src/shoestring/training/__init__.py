"""Groups -> credit -> rows -> micro-batches -> one update."""
