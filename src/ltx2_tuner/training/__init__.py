"""Flow matching, modes, losses, optimizers, the loop, state and validation."""
