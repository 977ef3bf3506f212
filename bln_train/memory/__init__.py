"""Memory: measured peaks."""
