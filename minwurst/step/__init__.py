"""One training step: everything the loop calls."""
