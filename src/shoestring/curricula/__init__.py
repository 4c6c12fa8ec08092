"""What the next prompts are."""
