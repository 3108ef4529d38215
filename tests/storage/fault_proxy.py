"""A proxy on loopback that injects storage faults: python fault_proxy.py PORT SERVER_URL

PUT /_faults sets the faults, a JSON object; GET /_faults returns how often each was injected.

    seed           of the random generator, with one draw per request; default 0
    unavailable    probability of answering 503
    throttle       probability of answering 429
    reset          probability of breaking the connection, before or after the server is contacted
    truncate       probability of cutting the answer in half
    latency_s      delay of every request, in seconds
    outage_s       seconds from now on in which every connection breaks
    silence_s      like `outage_s`, but connections stay open and nothing is ever sent
    deny           status with which every request is answered: 401, 403
    only           regular expression; faults affect only requests that match 'METHOD /path?query'
    preconditions  true: writes and deletions respect ifGenerationMatch, which the server ignores

At most one fault is injected per request; those given in seconds come first. The proxy neither
caches nor retries.
"""

import collections
import contextlib
import http.client
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, quote, urlsplit

_MAX_BODY = 1 << 28
_EVER_AFTER = 1000.0  # seconds
_PER_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


class Faults:
    """The current faults, and counts of those injected."""

    def __init__(self, settings):
        self.settings = settings
        self.since = time.monotonic()
        self.counts = collections.Counter()
        self._random = random.Random(settings.get("seed", 0))
        self._only = re.compile(settings.get("only", ""))
        self._lock = threading.Lock()

    def draw(self, line):
        """The fault to inject into a request, or None."""
        with self._lock:
            self.counts["requests"] += 1
            if not self._only.search(line):
                return None
            fault = self._choose()
            if fault:
                self.counts[fault] += 1
            return fault

    def _choose(self):
        for name in ("outage", "silence"):
            if time.monotonic() - self.since < self.settings.get(f"{name}_s", 0):
                return name
        if "deny" in self.settings:
            return "deny"
        drawn = self._random.random()
        for name in ("unavailable", "throttle", "reset", "truncate"):
            drawn -= self.settings.get(name, 0)
            if drawn < 0:
                return name
        return None

    def coin(self):
        with self._lock:
            return self._random.random() < 0.5


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_address = ""  # host:port of the real server
    faults = Faults({})
    complete: ClassVar = {}  # the last answer to each resumable upload, by upload id
    writing = threading.Lock()  # makes a precondition and its write atomic

    def do_GET(self):
        body = self._body()
        if self.path == "/_faults":
            return self._control(body)
        faults = Handler.faults
        time.sleep(faults.settings.get("latency_s", 0))
        fault = faults.draw(f"{self.command} {self.path}")
        if fault in ("unavailable", "throttle", "deny"):
            status = {"unavailable": 503, "throttle": 429}.get(fault) or faults.settings["deny"]
            message = json.dumps({"error": {"code": status, "message": f"injected: {fault}"}})
            return self._answer(status, [("Content-Type", "application/json")], message.encode())
        if fault == "silence":
            time.sleep(_EVER_AFTER)
            return self._break()
        if fault == "outage" or (fault == "reset" and faults.coin()):
            return self._break()
        if faults.settings.get("preconditions"):
            with Handler.writing:
                if not self._precondition_holds():
                    return self._answer(412, [], b"")
                answer = self._forward(body)
        else:
            answer = self._forward(body)
        if fault == "reset":
            return self._break()
        self._answer(*answer, whole=fault != "truncate")

    do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = do_GET

    def _control(self, body):
        if self.command == "PUT":
            Handler.faults = Faults(json.loads(body))
        self._answer(200, [], json.dumps(Handler.faults.counts).encode())

    def _body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", 0))
        assert length <= _MAX_BODY
        return self.rfile.read(length)

    def _forward(self, body, method=None, path=None):
        """The (status, headers, body) of the server's answer."""
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _PER_HOP}
        connection = http.client.HTTPConnection(self.server_address, timeout=60)
        with contextlib.closing(connection):
            connection.request(method or self.command, path or self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        if self.command == "HEAD":
            return answer.status, [("Content-Length", answer.getheader("Content-Length"))], data
        # Google's storage remembers that an upload is complete; this server does not.
        upload = parse_qs(urlsplit(self.path).query).get("upload_id", [""])[0]
        if upload and answer.status == 404 and upload in Handler.complete:
            return Handler.complete[upload]
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _PER_HOP]
        # A resumable upload continues at the URL that the server gives: it must be the proxy's.
        proxy_url = f"http://{self.headers['Host']}"
        server_url = f"http://{self.server_address}"
        result = answer.status, [(k, v.replace(server_url, proxy_url)) for k, v in kept], data
        if upload and answer.status == 200:
            Handler.complete[upload] = result
        return result

    def _precondition_holds(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "ifGenerationMatch" not in query or self.command not in ("POST", "DELETE"):
            return True
        path = url.path.removeprefix("/upload")
        if "name" in query:
            path += f"/{quote(query['name'][0], safe='')}"
        status, _, data = self._forward(b"", "GET", path)
        generation = int(json.loads(data)["generation"]) if status == 200 else 0
        return generation == int(query["ifGenerationMatch"][0])

    def _answer(self, status, headers, data, whole=True):
        self.send_response(status)
        if not any(name == "Content-Length" for name, _ in headers):
            headers = [*headers, ("Content-Length", str(len(data)))]
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if whole else data[: len(data) // 2])
        if not whole:
            self._break()

    def _break(self):
        """Resets the connection, which discards unsent data."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def log_message(self, *_):
        pass


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_):
        """Ignores errors of clients that give up or are killed, which is expected here."""


if __name__ == "__main__":
    port, url = int(sys.argv[1]), sys.argv[2]
    Handler.server_address = urlsplit(url).netloc
    Proxy(("127.0.0.1", port), Handler).serve_forever()
