"""Settings for all tests."""

import gc
import uuid

import pytest
from hypothesis import HealthCheck, settings

from tests.object_server import root_url, shared_server

# A busy machine makes neither a property false nor its examples wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


gc.disable()  # until all is imported: a million objects that the collector need not look at


def pytest_collection_finish(session):
    """Leave what the imports made out of every later collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def object_server(tmp_path_factory, worker_id):
    """The environment variables of an object server, one for all workers of this run."""
    folder = tmp_path_factory.getbasetemp()
    return shared_server((folder if worker_id == "master" else folder.parent) / "object-server")


@pytest.fixture
def s3(object_server, monkeypatch):
    """A URL below which there is nothing; the environment leads to the server."""
    for name, value in object_server.items():
        monkeypatch.setenv(name, value)
    return f"{root_url()}/{uuid.uuid4().hex}"


@pytest.fixture(params=[False, True], ids=["late", "early"])
def machine(request):
    """A stand-in for an accelerator that runs work as late or as early as it may."""
    from tests.device_states import forget
    from tests.stand_in_device import stand_in

    with stand_in(eager=request.param) as machine:
        yield machine
        forget()


@pytest.fixture
def late():
    """A stand-in for an accelerator that runs work as late as it may."""
    from tests.device_states import forget
    from tests.stand_in_device import stand_in

    with stand_in() as machine:
        yield machine
        forget()
