"""shardckpt behind the interfaces of other libraries."""
