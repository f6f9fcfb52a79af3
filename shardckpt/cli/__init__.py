"""The shardckpt command."""
