"""Examples: what they are, where they are read from, how a model takes them."""
