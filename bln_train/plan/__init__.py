"""Memory predicted before a run."""
