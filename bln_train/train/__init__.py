"""The accumulation step, the loop, checkpoints and evaluation."""
