"""`python -m shardckpt` is the shardckpt command."""

import sys

from shardckpt.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
