"""Cloud Storage on loopback, over HTTP, with faults on purpose.

gcp-storage-emulator in this process, corrected where it differs from the service: downloads carry
their generation, which TensorStore reads; a request that ends too early stores nothing; and the
last part of an upload may be sent again.
"""

import asyncio
import contextlib
import http.server
import io
import json
import random
import socket
import struct
import threading
import time
import types
from collections.abc import Callable, Iterator

import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

from nvg_jax.runtime import checkpoint

NAME = "bucket"
RESET, RESET_AFTER = "reset", "reset after the work"  # what a fault may be, besides an HTTP status
Fault = Callable[[str, str], int | str | None]


class Bucket:
    """gs://bucket.

    Attributes:
        url: of the service.
        fault: (method, path) -> None, the status of an error, RESET or RESET_AFTER.
        latency: seconds that every request takes.
        requests: the number of requests so far.
    """

    def __init__(self):
        self.fault: Fault = lambda method, path: None
        self.latency, self.requests, self.url = 0.0, 0, ""
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(NAME, self.storage)
        self.lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which libraries find the service."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # needs another service
        }

    def names(self) -> list[str]:
        return sorted(self.storage.objects.get(NAME, {}))

    def clear(self):
        self.fault, self.latency = lambda method, path: None, 0.0
        with self.lock:
            self.storage.wipe(keep_buckets=True)


def shorten_pauses(monkeypatch: pytest.MonkeyPatch):
    """What waits for a bucket waits a twentieth of the time."""
    sleep = lambda seconds: asyncio.sleep(seconds / 20)
    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(checkpoint, "PAUSES", (0.1, 0.2, 0.4, 0.8, 1.6, 3.2))


def some_requests_fail(share: float, seed: int = 0) -> Fault:
    """A share of the requests is answered 503 or 429, or the connection is reset."""
    rng = random.Random(seed)
    kinds = [503, 429, RESET, RESET_AFTER]
    return lambda method, path: rng.choice(kinds) if rng.random() < share else None


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    bucket = Bucket()
    uploads = {}  # {path of a complete upload: the answer to its last part}

    class Handler(server.RequestHandler):
        def __init__(self, *args):
            super().__init__(bucket.storage, *args)

        def parse_request(self):
            if not super().parse_request():
                return False
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            bucket.requests += 1
            time.sleep(bucket.latency)
            fault = bucket.fault(self.command, self.path)
            if len(body) < length or fault == RESET:  # a client that was killed, or a fault
                return self.reset()
            if isinstance(fault, int):
                content = json.dumps({"error": {"code": fault, "message": "on purpose"}}).encode()
                self.send_response(fault)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return False
            client, self.wfile = self.wfile, io.BytesIO()
            self.rfile = io.BytesIO(body)
            upload = "upload_id=" in self.path
            with bucket.lock:
                answer = uploads.get(self.path) if upload else None
                if answer is None:
                    getattr(self, f"do_{self.command}")()
                    answer = self.wfile.getvalue()
                    if upload and answer.split()[1] in (b"200", b"201"):
                        uploads[self.path] = answer
            if fault == RESET_AFTER:
                return self.reset()
            client.write(answer)
            return False

        def reset(self):
            linger = struct.pack("ii", 1, 0)  # closing sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            return False

        def log_message(self, *args):
            pass

    download = objects.download

    def with_generation(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        with contextlib.suppress(Exception):
            name = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = str(storage.get_file_obj(*name)["generation"])

    objects.download = with_generation  # for `objects.get`
    routes = server.HANDLERS
    server.HANDLERS = tuple(
        (path, {m: with_generation if h is download else h for m, h in methods.items()})
        for path, methods in routes
    )
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    bucket.url = f"http://127.0.0.1:{http_server.server_port}"
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        http_server.shutdown()
        http_server.server_close()
        server.HANDLERS, objects.download = routes, download
