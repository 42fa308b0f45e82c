"""The optimizer: batch -> rows (capture) -> average -> update -> base step -> guard -> record."""
