"""An object store on this machine: SeaweedFS, with the interface of S3."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET, REGION = "key", "secret", "us-east-1"
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


def program() -> str:
    """The path of the program, which pip installs beside Python."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed") or "weed"


@contextlib.contextmanager
def object_server(*, volumes: int = 60) -> Iterator[dict[str, str]]:
    """Run a server for the with block; its environment variables. It is healthy when this yields,
    and has the bucket `tests`. It keeps up to 128 MB in each volume."""
    folder = tempfile.mkdtemp(prefix="shardckpt-objects-")
    s3, master, volume, filer = free_ports(4)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = Path(folder, "s3.json")
    config.write_text(json.dumps({"identities": [identity]}))
    command = [
        *(program(), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
        *(f"-s3.port={s3}", f"-s3.config={config}", f"-master.port={master}"),
        *(f"-volume.port={volume}", f"-filer.port={filer}", "-master.volumeSizeLimitMB=128"),
        *(f"-volume.max={volumes}", "-master.electionTimeout=1s", "-master.telemetry=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # their default ports may be taken
    ]
    log = open(Path(folder, "log"), "wb")  # noqa: SIM115
    server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    try:
        _wait_until_healthy(server, environment(s3), Path(folder, "log"))
        yield environment(s3)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_healthy(
    server: subprocess.Popen[bytes], variables: dict[str, str], log: Path
) -> None:
    import obstore
    from obstore.store import S3Store

    give_up_at = time.monotonic() + _START_S
    config = {name.lower(): value for name, value in variables.items()}
    while True:
        try:
            store = S3Store("tests", config=config, retry_config={"max_retries": 0})
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
