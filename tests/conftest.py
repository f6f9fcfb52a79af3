"""Settings for all tests."""

import os

from hypothesis import HealthCheck, settings

# A busy machine makes neither a property false nor its examples wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# For each connection torch's store asks for the names of both ends, and a name server that does not
# answer holds up all ranks, for 5 s if nothing is said.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
