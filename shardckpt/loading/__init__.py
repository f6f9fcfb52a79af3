"""From a checkpoint to a state."""
