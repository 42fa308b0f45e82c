"""From options to a finished folder."""
