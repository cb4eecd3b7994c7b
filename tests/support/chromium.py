"""A real headless Chromium over its DevTools protocol: a page is opened, and all it says and asks for is kept."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 180
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--remote-debugging-address=127.0.0.1",
)


def executable():
    """The browser of this machine, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process, ended by its own number; `folder` is its profile."""

    def __init__(self, folder: Path) -> None:
        self.url = ""
        self.log = (folder / "log").open("wb")
        command = [executable(), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)
        told, deadline = folder / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (told.exists() and told.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"{command[0]} did not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        port, path = told.read_text().splitlines()[:2]
        self.url = f"ws://127.0.0.1:{port}{path}"

    def close(self) -> None:
        # asked to, it also removes what it made in the folder for temporary files; a signal would leave that
        if self.url and self.process.poll() is None:
            with contextlib.suppress(OSError, WebSocketException), connect(self.url, proxy=None) as socket:
                socket.send(json.dumps({"id": 1, "method": "Browser.close"}))
                self._ended(10)
        self.process.terminate()
        if not self._ended(10):
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _ended(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def open(self, page: Path, width: int, height: int = 900) -> Tab:
        return Tab(self.url, page, width, height)


class Tab:
    """A page that was opened; `requests`: URLs it asked for, `said`: what came to the console, errors among it."""

    def __init__(self, url: str, page: Path, width: int, height: int) -> None:
        self._socket = connect(url, max_size=None, open_timeout=SECONDS, proxy=None)
        self._number, self._session = 0, None
        self.requests, self.said, self._loaded = [], [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self._loaded = False
        self.call("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._note(json.loads(self._socket.recv(SECONDS)))

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(SECONDS))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event):
        method, found = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.said.append(found)
        elif method == "Page.loadEventFired":
            self._loaded = True

    def value(self, expression):
        """What a script gives, looked at from outside: the page itself may run none."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        self._socket.close()
