"""The user's state: flatten it, take snapshots of it, and match it with a saved one."""
