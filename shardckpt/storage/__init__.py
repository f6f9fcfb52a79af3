"""Where checkpoints lie: one Protocol, and the local file system."""
