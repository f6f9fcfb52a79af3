"""Compare, measure and merge checkpoints of any format that can be read."""
