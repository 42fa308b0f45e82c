"""Scores a model: what it knows, what it says, and what it has memorised."""
