"""Test shardckpt with several versions of torch, Python and numpy."""
