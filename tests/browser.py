"""A headless Chromium, driven over a pipe by its DevTools protocol with the standard library alone."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

_OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
    *("--disable-dev-shm-usage", "--disable-extensions"),
]
_SECONDS = 60  # for any answer

# the browser reads commands from file descriptor 3 and writes answers to 4
_LAUNCH = """
import fcntl, os, sys
down, up = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(down, 3), os.dup2(up, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser():
    """The browser's path; without one the tests are skipped, or fail where SNRWEIGHTS_REQUIRE_BROWSER is set."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        complain = pytest.fail if os.environ.get("SNRWEIGHTS_REQUIRE_BROWSER") else pytest.skip
        complain("there is no chromium on the path: apt-get install chromium")
    return found


class Browser:
    """One browser with one tab; ``events`` are all that it told unasked since the last ``open``."""

    def __init__(self, path, profile):
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        command = [path, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self._in, self._out, self._buffer = ours_in, ours_out, b""
        self._numbers, self._session, self.events = itertools.count(1), None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    def close(self):
        os.close(self._out)
        self._process.terminate()
        self._process.wait(_SECONDS)
        os.close(self._in)

    def __call__(self, method, **parameters):
        """Send a command; return its result."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        message = json.dumps({"id": number, "method": method, "params": parameters, **session})
        os.write(self._out, message.encode() + b"\0")
        answer = self._wait(lambda told: told.get("id") == number)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _wait(self, wanted):
        until = time.monotonic() + _SECONDS
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
                read = os.read(self._in, 1 << 16) if ready else b""
                assert read, "the browser does not answer"
                self._buffer += read
            message, _, self._buffer = self._buffer.partition(b"\0")
            told = json.loads(message)
            if "method" in told:
                self.events.append(told)
            if wanted(told):
                return told

    def open(self, path, width, scheme, height=800):
        """Show a file from disk at a width, in the light or the dark scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self("Emulation.setDeviceMetricsOverride", **metrics)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self("Page.navigate", url=path.resolve().as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._wait(lambda told: told.get("method") == "Page.loadEventFired")

    def evaluate(self, script):
        """Run an expression in the page; return its value."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path):
        """Write the whole page as PNG."""
        data = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
