"""Reports and drawings of runs, comparisons and memory sweeps. They read files, never live objects."""
