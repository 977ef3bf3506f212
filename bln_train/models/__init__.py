"""Networks; the norm arrives as a callable."""
