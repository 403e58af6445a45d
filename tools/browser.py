"""Open a page in headless Chromium: what it logged, what it asked for, how it is laid out, what it looks like.

Speaks the DevTools protocol over a pipe, so it needs nothing beyond Python and a Chromium:

    python tools/browser.py report.html                          # console errors and requests
    python tools/browser.py report.html --screenshot out.png --width 390 --dark

`HIPLORA_BROWSER` names a browser that is not on PATH. Exit status 1: the page logged an error or asked for
anything but itself.
"""

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads commands on descriptor 3 and writes to 4; this moves the pipe's ends there, then becomes it.
_LAUNCH = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]); "
    "os.dup2(r, 3); os.dup2(w, 4); os.closerange(5, 64); os.execvp(sys.argv[3], sys.argv[3:])"
)


class BrowserError(RuntimeError):
    """The browser did not start, did not answer in time, or refused a command."""


@dataclass
class Visit:
    """What one page did: messages of level error, exceptions, and every address that it asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    named = os.environ.get("HIPLORA_BROWSER")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One headless Chromium with one tab, in a fresh profile; a context manager."""

    def __init__(self, binary: str, timeout: float = 60.0):
        self.timeout = timeout
        self._binary, self._number, self._buffer = binary, 0, b""
        self._visit = Visit()
        self._loaded = False

    def __enter__(self) -> "Browser":
        self._profile = tempfile.mkdtemp(prefix="hiplora-browser-")
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        launch = [sys.executable, "-c", _LAUNCH, str(commands), str(answers), self._binary, *FLAGS]
        self._process = subprocess.Popen(
            [*launch, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        try:
            self._session = None
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: object) -> dict:
        """Send one DevTools command and return its result; events met on the way are recorded."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout
        while True:
            answer = self._read(end, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            self._event(answer)

    def view(self, width: int, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Set the window's size in CSS pixels, the colour preference and the medium (`screen`, `print`)."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def open(self, address: str, settle: float = 0.3) -> Visit:
        """Open a page, wait until it has loaded and a moment more; return what it logged and asked for."""
        self._visit, self._loaded = Visit(), False
        self.call("Page.navigate", url=address)
        end = time.monotonic() + self.timeout
        while not self._loaded:
            self._event(self._read(end, f"load {address}"))
        time.sleep(settle)
        self.evaluate("1")  # collects the events of the moment after loading
        return self._visit

    def evaluate(self, expression: str) -> object:
        """Evaluate JavaScript in the page and return its value."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, whole: bool = True) -> bytes:
        """Return a PNG of the whole page, or of the window."""
        answer = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole)
        )
        return base64.b64decode(answer["data"])

    def _clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _read(self, end: float, what: str) -> dict:
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise BrowserError(f"{what}: no answer from {self._binary} within {self.timeout:.0f} s")
            block = os.read(self._in, 1 << 20)
            if not block:
                raise BrowserError(f"{what}: {self._binary} ended with status {self._process.poll()}")
            self._buffer += block
        raw, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(raw)

    def _event(self, message: dict) -> None:
        name, params = message.get("method"), message.get("params", {})
        if name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Network.requestWillBeSent":
            self._visit.requests.append(params["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self._visit.errors.append(params["exceptionDetails"].get("text", "exception"))
        elif name == "Log.entryAdded" and params["entry"]["level"] == "error":
            self._visit.errors.append(params["entry"]["text"])
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self._visit.errors.append(" ".join(str(part.get("value", "")) for part in params["args"]))


def foreign(visit: Visit, address: str) -> list[str]:
    """Return the requests of a visit that left the page: all but its own address and `data:`."""
    return [url for url in visit.requests if url.split("#")[0] != address and not url.startswith("data:")]


def main() -> int:
    """Open the page named on the command line and say what it did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--print", action="store_true", help="with the style for paper")
    parser.add_argument("--script", help="JavaScript to run before the screenshot")
    args = parser.parse_args()
    binary = find_browser()
    if binary is None:
        sys.exit(f"no browser: none of {', '.join(NAMES)} is on PATH; install Debian's `chromium`")
    address = args.page.resolve().as_uri()
    with Browser(binary) as browser:
        browser.view(args.width, args.height, args.dark, "print" if args.print else "screen")
        visit = browser.open(address)
        if args.script:
            browser.evaluate(args.script)
        if args.screenshot:
            args.screenshot.write_bytes(browser.screenshot())
    for problem in (*visit.errors, *foreign(visit, address)):
        print(problem)
    return 1 if visit.errors or foreign(visit, address) else 0


if __name__ == "__main__":
    sys.exit(main())
