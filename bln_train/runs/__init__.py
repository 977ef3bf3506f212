"""The files of a run: its folder, its checkpoints, its events for TensorBoard."""
