"""From and to the checkpoints of others."""
