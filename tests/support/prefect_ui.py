"""`make ui` as a test has it, and its pages in a Chromium, used as a person does."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import chromium
from tests.support.prefect_home import _ENDS_WITH_PARENT, ROOT, PrefectHome

BROWSER = chromium.executable() is not None and os.environ.get("OUTLIERS_TEST_BROWSER") == "1"
in_browser = pytest.mark.skipif(not BROWSER, reason="takes minutes in a Chromium: `make test-browser`")


class Ui(PrefectHome):
    """`python -m flows.server.ui`, with the means to look at what it started."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        super().__init__(folder, environment)
        self.url = f"http://127.0.0.1:{self.port}"
        self.said = folder / "ui.txt"

    def __enter__(self) -> Ui:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.said.open("wb") as said:
            command = [sys.executable, "-c", _ENDS_WITH_PARENT, str(os.getpid()), *self.command()]
            self._processes = [
                subprocess.Popen(
                    command, env=self.environment, cwd=ROOT, stdout=said, stderr=said, stdin=subprocess.DEVNULL
                )
            ]
        self._await(lambda: "Ctrl-C ends" in self.said.read_text(), "word of what to open", explain=self.said.read_text)
        return self

    def __exit__(self, *_: object) -> None:
        (process,) = self._processes
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(120)

    def command(self, *options: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "flows.server.ui",
            "--port",
            str(self.port),
            "--home",
            str(self.folder / "home"),
            *options,
        ]

    @property
    def password(self) -> str:
        return self.password_file.read_text().strip()

    @property
    def password_file(self) -> Path:
        return self.folder / "home" / f"ui-{self.port}.password"

    def client_environment(self) -> dict[str, str]:
        return self.environment | {"PREFECT_API_AUTH_STRING": self.password}

    def headers(self, method: str) -> dict[str, str]:
        basic = {"Authorization": "Basic " + base64.b64encode(self.password.encode()).decode()}
        if method == "GET":
            return basic
        token = self.call("GET", "/csrf-token?client=test")["token"]
        return basic | {"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token}

    def pids(self) -> list[int]:
        """Of the server and the worker, as it says them."""
        last = self.said.read_text().rsplit("Ctrl-C ends", 1)[1]
        return [int(part.split(")")[0]) for part in last.split("(")[1:]]

    def python(self, script: str) -> subprocess.Popen[str]:
        """A script of the control side, with this server."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-u", "-c", script],
            env=self.client_environment(),
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Url(str):
    """What `chromium.Tab` opens."""

    def as_uri(self) -> str:
        return str(self)


class Page(chromium.Tab):
    """A page of Prefect's, used as a person does: by the words on it, with mouse and keyboard."""

    def __init__(self, browser, url: str) -> None:
        super().__init__(browser.url, Url(url), 1280, 1000)

    def until(self, expression: str, what: str, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not (found := self.value(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {seconds} s on a page that says: {self.text()[:3000]}")
            time.sleep(0.2)
        return found

    def text(self) -> str:
        return self.value("document.body.innerText")

    def see(self, *texts: str, seconds: float = 60) -> None:
        for text in texts:
            self.until(f"document.body.innerText.includes({json.dumps(text)})", text, seconds)

    def click(self, text: str, within: str = "button, a, [role=menuitem], [role=tab], li") -> None:
        """The last thing to click that says exactly this: a dialog comes after the page."""
        x, y = self.until(
            f"""(() => {{
              const found = [...document.querySelectorAll({json.dumps(within)})].filter(
                e => e.getClientRects().length && e.innerText.trim() === {json.dumps(text)} && !e.disabled).pop();
              if (!found) return null;
              found.scrollIntoView({{block: 'center'}});
              const box = found.getBoundingClientRect();
              return [box.x + box.width / 2, box.y + box.height / 2];
            }})()""",
            f"{text} to click",
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, label: str, value: object) -> None:
        """Type into the field under that label, over what is there."""
        self.until(
            f"""(() => {{
              for (const e of document.querySelectorAll('label, span, div, p')) {{
                if (![{json.dumps(label)}, {json.dumps(label + " (Optional)")}].includes(e.innerText.trim())) continue;
                for (let up = e; up; up = up.parentElement) {{
                  const field = up.querySelector('textarea, input:not([type=checkbox])');
                  if (field) {{ field.scrollIntoView({{block: 'center'}}); field.focus(); field.select(); return true; }}
                }}
              }}
              return false;
            }})()""",
            f"field {label}",
        )
        self.call("Input.insertText", text=str(value))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def logged_in(ui, browser):
    """The browser, once its person has opened the link that a terminal shows."""
    page = Page(browser, f"{ui.url}/enter#{ui.password}")
    page.see("Dashboard", "Work Pools")
    assert "#" not in page.value("location.href")
    assert page.value("history.length") <= 2, "the address with the password is not gone back to"
    page.close()
    return browser
