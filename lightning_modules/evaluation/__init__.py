"""What a model knows, says and has memorised."""
