"""An object store on this machine: SeaweedFS, with the interface of S3.

With the environment variable TEST_STORE=moto or TEST_STORE=azurite it is moto (S3) or azurite
(Azure); scripts/stores installs them.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import fcntl
import hashlib
import hmac
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET, REGION = "key", "secret", "us-east-1"
_ACCOUNT_KEY = base64.b64encode(b"a key of 16 bytes").decode()
_START_S = 120
_started: list[subprocess.Popen[bytes]] = []  # they outlive the tests


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses, for which 10,000 more is a port too (SeaweedFS takes it for gRPC)."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1] % 20_000 + 20_000
            try:
                other.bind(("127.0.0.1", port + 10_000))
                with socket.socket() as third:
                    third.bind(("127.0.0.1", port))
            except OSError:
                continue
            if port not in ports:
                ports.append(port)
    return ports


def environment(port: int) -> dict[str, str]:
    """The variables by which the tools of S3 find the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": REGION,
        "AWS_ALLOW_HTTP": "true",
    }


def azure_environment(port: int) -> dict[str, str]:
    """The variables by which the tools of Azure find the server."""
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": KEY,
        "AZURE_STORAGE_ACCOUNT_KEY": _ACCOUNT_KEY,
        "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{KEY}",
        "AZURE_ALLOW_HTTP": "true",
    }


def root_url() -> str:
    """The URL of the bucket for tests."""
    return "az://tests" if os.environ.get("TEST_STORE") == "azurite" else "s3://tests"


def program(name: str = "weed") -> str:
    """The path of a program, which pip installs beside Python."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


@contextlib.contextmanager
def object_server(*, volumes: int = 60) -> Iterator[dict[str, str]]:
    """Run a server for the with block; its environment variables. It is healthy when this yields,
    and has the bucket `tests`. SeaweedFS keeps up to 128 MB in each volume."""
    folder = tempfile.mkdtemp(prefix="shardckpt-objects-")
    kind = os.environ.get("TEST_STORE", "seaweedfs")
    port, *more = free_ports(4)
    variables = azure_environment(port) if kind == "azurite" else environment(port)
    command = {"seaweedfs": _seaweedfs, "moto": _moto, "azurite": _azurite}[kind](folder, port)
    if kind == "seaweedfs":
        command += [
            *(f"-master.port={more[0]}", f"-volume.port={more[1]}", f"-filer.port={more[2]}"),
            *(f"-volume.max={volumes}", "-volume.minFreeSpace=100MiB"),  # by default 1% of the disk
        ]
    log = open(Path(folder, "log"), "wb")  # noqa: SIM115
    accounts = {"AZURITE_ACCOUNTS": f"{KEY}:{_ACCOUNT_KEY}"}
    server = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd=folder,
        env={**os.environ, **accounts},
    )
    try:
        _wait_until_healthy(server, port, variables, Path(folder, "log"))
        yield variables
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _seaweedfs(folder: str, port: int) -> list[str]:
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = Path(folder, "s3.json")
    config.write_text(json.dumps({"identities": [identity]}))
    return [
        *(program(), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
        *(f"-s3.port={port}", f"-s3.config={config}", "-master.volumeSizeLimitMB=128"),
        *("-master.electionTimeout=1s", "-master.telemetry=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # their default ports may be taken
    ]


def _moto(folder: str, port: int) -> list[str]:
    return [program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]


def _azurite(folder: str, port: int) -> list[str]:
    return [
        *(program("azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port)),
        *("--location", folder, "--disableTelemetry", "--skipApiVersionCheck", "--silent"),
    ]


def _make_bucket(port: int) -> None:
    """Make the bucket, which SeaweedFS makes by itself. It may exist."""
    kind = os.environ.get("TEST_STORE", "seaweedfs")
    if kind == "seaweedfs":
        return
    headers = {}
    url = f"http://127.0.0.1:{port}/tests"
    if kind == "azurite":
        url = f"http://127.0.0.1:{port}/{KEY}/tests?restype=container"
        headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
        named = "".join(f"{name}:{text}\n" for name, text in headers.items())
        signed = "PUT" + "\n" * 12 + f"{named}/{KEY}/{KEY}/tests\nrestype:container"
        digest = hmac.new(base64.b64decode(_ACCOUNT_KEY), signed.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {KEY}:{base64.b64encode(digest).decode()}"
    request = urllib.request.Request(url, method="PUT", headers=headers)
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=10).close()


def _wait_until_healthy(
    server: subprocess.Popen[bytes], port: int, variables: dict[str, str], log: Path
) -> None:
    import obstore
    from obstore.store import from_url

    give_up_at = time.monotonic() + _START_S
    config = {name.lower(): value for name, value in variables.items()}
    allow = {"allow_http": True}
    config = {name: value for name, value in config.items() if not name.endswith("allow_http")}
    while True:
        try:
            _make_bucket(port)
            store = from_url(
                root_url(), config=config, client_options=allow, retry_config={"max_retries": 0}
            )
            obstore.put(store, "healthy", b"1")
            obstore.delete(store, "healthy")
            return
        except Exception as error:
            if server.poll() is not None or time.monotonic() > give_up_at:
                tail = log.read_bytes()[-2000:].decode(errors="replace")
                raise RuntimeError(f"the object server did not start: {error}\n{tail}") from error
            time.sleep(0.2)


def shared_server(folder: Path) -> dict[str, str]:
    """The server that the processes which name the same folder share; its environment variables.

    The first one starts it, as a process of its own. It ends once none of them is alive.
    """
    users = folder / "users"
    users.mkdir(parents=True, exist_ok=True)
    (users / str(os.getpid())).touch()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = folder / "variables.json"
        if not found.exists():
            with open(folder / "errors", "wb") as errors:
                _started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.object_server", str(folder)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                        start_new_session=True,
                        cwd=Path(__file__).parents[1],
                    )
                )
            give_up_at = time.monotonic() + _START_S
            while not found.exists():
                if time.monotonic() > give_up_at:
                    raise RuntimeError((folder / "errors").read_text())
                time.sleep(0.1)
    variables: dict[str, str] = json.loads(found.read_text())
    return variables


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Run a server while any process is alive that has a file in FOLDER/users."""
    folder = Path(sys.argv[1])
    with object_server() as variables:
        new = folder / "variables.json.new"
        new.write_text(json.dumps(variables))
        new.rename(folder / "variables.json")
        while True:
            time.sleep(0.5)
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not any(_alive(path.name) for path in (folder / "users").iterdir()):
                    # A process that comes later must start another server.
                    (folder / "variables.json").unlink()
                    return


if __name__ == "__main__":
    main()
