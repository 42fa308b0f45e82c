"""Slow, independent oracles, written from the papers and never from the code under test."""
