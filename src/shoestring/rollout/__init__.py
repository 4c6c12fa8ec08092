"""Prompts -> completions -> scores."""
