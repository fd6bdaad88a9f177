"""What makes a sequence of steps a run: identity, checkpoints, log, validation."""
