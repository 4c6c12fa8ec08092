"""The model: its files, its shape, its policy, its log-probs."""
