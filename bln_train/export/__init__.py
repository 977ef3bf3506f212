"""Trained networks for use elsewhere, and weights from elsewhere."""
