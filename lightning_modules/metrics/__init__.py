"""Unlearning metrics. `functional` holds the pure functions, on which everything that reports a number rests."""

from lightning_modules.metrics import functional

__all__ = ["functional"]
