"""Tests."""

import os

# For each connection torch's store asks for the names of both ends, and a name server that does not
# answer holds up all ranks, for 5 s if nothing is said.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
