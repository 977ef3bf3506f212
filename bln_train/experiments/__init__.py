"""Whole experiments: one run, a comparison, a memory sweep, the synthetic experiment, a look at the machine."""
