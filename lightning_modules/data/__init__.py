"""Reading: examples, tokens, and pairs of forget and retain batches."""
