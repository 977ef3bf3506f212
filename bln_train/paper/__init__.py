"""The published method as it was published: its layer, and what its statistics make of known streams."""
