"""A running `gloam serve`, and plain HTTP to it."""

import http.client
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
START_SECONDS = 120
PATIENCE_SECONDS = 60  # a broken test ends, a slow machine does not


def binary():
    """$GLOAM_BIN, or the newest build that there is."""
    if os.environ.get("GLOAM_BIN"):
        return pathlib.Path(os.environ["GLOAM_BIN"])
    built = [ROOT / "build" / preset / "gloam" for preset in ("cpu", "release")]
    built = [path for path in built if path.exists()]
    if not built:
        raise FileNotFoundError("no gloam in build/cpu or build/release: build it, or set GLOAM_BIN")
    return max(built, key=lambda path: path.stat().st_mtime)


class Response:
    def __init__(self, status, headers, body):
        self.status = status
        self.headers = headers
        self.body = body

    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json()["error"]


class GloamProcess:
    """Starts on free ports of 127.0.0.1 and waits until it serves."""

    def __init__(self, *flags, log_path, model=MODEL):
        self.log_path = log_path
        self.model = model
        command = [str(binary()), "serve", model, "--device", "cpu", "--port", "0"]
        command += ["--grpc-port", "0", "--kv-cache-memory", "1G", *flags]
        self._log = open(log_path, "wb")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT
        )
        self._lines = queue.Queue()
        threading.Thread(target=self._read_output, daemon=True).start()
        self.port = int(self._wait_for_line(r"HTTP\s+http://127\.0\.0\.1:(\d+)"))
        self.grpc_port = int(self._wait_for_line(r"gRPC\s+127\.0\.0\.1:(\d+)"))
        assert self.get("/ready").status == 200

    def _read_output(self):
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _wait_for_line(self, pattern):
        deadline = time.monotonic() + START_SECONDS
        while True:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            if line is None:
                raise RuntimeError(f"gloam ended: {self.log_path.read_text()[-2000:]}")
            found = re.search(pattern, line)
            if found:
                return found.group(1)

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def grpc_address(self):
        return f"127.0.0.1:{self.grpc_port}"

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def post(self, path, body, **headers):
        """`body`: bytes as they are, anything else as JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        return self.request("POST", path, body, {"Content-Type": "application/json", **headers})

    def metric(self, name):
        """Sum over the metric's label sets."""
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics").body.decode().splitlines()
            if re.match(re.escape(name) + r"[ {]", line)
        ]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_until_idle(self):
        """No request is left and no KV block is in use."""
        names = ("gloam:num_requests_running", "gloam:num_requests_waiting")
        names += ("gloam:kv_cache_usage_perc",)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            values = {name: self.metric(name) for name in names}
            if not any(values.values()):
                return
            assert time.monotonic() < deadline, f"not idle: {values}"
            time.sleep(0.05)

    def rss_bytes(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self):
        """The exit status."""
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def close(self):
        """For fixtures: what still runs at the end of a failed test is killed."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()
