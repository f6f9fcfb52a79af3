"""Settings for all tests."""

from hypothesis import HealthCheck, settings

# A busy machine makes neither a property false nor its examples wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
