"""Storages of checkpoints: the base classes, and the local file system."""
