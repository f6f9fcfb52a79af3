"""The errors of clients of object stores, which a server on this machine answers."""

from __future__ import annotations

import http.server
import ssl
import threading
from pathlib import Path

import pytest

from shardckpt.errors import StateError, StoreUnavailableError
from shardckpt.storage.object_clients import ClientObjects, _unsigned
from shardckpt.storage.objects import ConditionFailedError


@pytest.fixture
def answering(monkeypatch):
    """Starts a server that gives one answer; returns the objects of a bucket in it."""
    servers = []

    def start(scheme: str, status: int, code: str, *, certificate: str = "") -> ClientObjects:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self):
                self.rfile.read(int(self.headers.get("content-length") or 0))
                body = f"<Error>\n  <Code>{code}</Code>\n</Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        protocol = "https" if certificate else "http"
        endpoint = f"{protocol}://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        settings = {
            "s3": {
                "endpoint": endpoint,
                "access_key_id": "key",
                "secret_access_key": "secret",
                "region": "us-east-1",
            },
            "az": {"endpoint": endpoint, "account_name": "key", "account_key": "a2V5"},
        }[scheme]
        return ClientObjects(f"{scheme}://tests", {**settings, "allow_http": True})

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("scheme", "status", "code", "error"),
    [
        ("s3", 412, "PreconditionFailed", ConditionFailedError),
        ("s3", 409, "ConditionalRequestConflict", StoreUnavailableError),
        ("s3", 503, "SlowDown", StoreUnavailableError),
        ("az", 409, "BlobAlreadyExists", ConditionFailedError),
        ("az", 409, "LeaseIdMissing", StoreUnavailableError),
        ("az", 412, "ConditionNotMet", ConditionFailedError),
    ],
)
def test_a_failed_condition_and_a_busy_store_are_different_errors(
    answering, scheme, status, code, error
):
    objects = answering(scheme, status, code)
    with pytest.raises(error):
        objects.put_if("key", b"text", replaces=None)


def test_payloads_are_signed_without_tls(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_UNSIGNED_PAYLOAD"):
        monkeypatch.delenv(name, raising=False)
    unsigned = {"unsigned_payload": "true"}
    assert _unsigned("s3://tests", {}) == unsigned
    assert _unsigned("s3://tests", {"endpoint": "https://store"}) == unsigned
    assert _unsigned("s3://tests", {"endpoint": "http://store"}) == {}
    assert _unsigned("gs://tests", {}) == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store")
    assert _unsigned("s3://tests", {}) == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store")
    assert _unsigned("s3://tests", {}) == unsigned
    monkeypatch.setenv("AWS_UNSIGNED_PAYLOAD", "false")
    assert _unsigned("s3://tests", {}) == {}, "what the program's environment says counts"


def test_a_store_with_a_certificate_of_its_own(answering, monkeypatch):
    """AWS_CA_BUNDLE names the file of the certificates, as for Amazon's own tools."""
    folder = Path(__file__).parent / "certificates"

    def put():
        objects = answering("s3", 412, "no", certificate=str(folder / "server.pem"))
        objects.put_if("key", b"text", replaces=None)

    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with pytest.raises(StoreUnavailableError):
        put()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(folder / "certificate.pem"))
    with pytest.raises(ConditionFailedError):
        put()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(folder / "missing.pem"))
    with pytest.raises(StateError, match=r"missing\.pem"):
        put()
