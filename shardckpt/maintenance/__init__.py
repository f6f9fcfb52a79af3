"""Verify, repair and rewrite checkpoints."""
