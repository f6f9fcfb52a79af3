"""shardckpt beside its peers and the limit of the machine; `scripts/bench --help`."""
