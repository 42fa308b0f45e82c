"""What Lightning trains: modules, objectives, heads, references, adapters and callbacks."""
