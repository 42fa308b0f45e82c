"""Data: reads examples, turns them into tokens, and pairs forget with retain examples in batches."""
