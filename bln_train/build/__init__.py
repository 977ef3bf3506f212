"""The only place where a recipe becomes objects."""
