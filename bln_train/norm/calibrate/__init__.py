"""First statistics, measured from images."""
