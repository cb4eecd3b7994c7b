"""The pages of `make ui` in a real browser: a person logs in, and a page of another origin gets nothing, logged in or not."""

from __future__ import annotations

import functools
import http.server
import threading

import pytest

from tests.support import chromium
from tests.support.prefect_ui import Page, Ui, in_browser

pytestmark = [pytest.mark.servers, in_browser]

EVIL = """<!doctype html><title>evil</title>
<iframe name=frame></iframe>
<form method=POST target=frame enctype="text/plain" action="TARGET/api/flows/">
<input name='{"name":"of-a-form","x":"' value='"}'></form>
<script>
window.got = {};
const body = JSON.stringify({name: 'of-a-page'}), name = e => e.name;
const kind = (made, what) => new Promise(done => {
  for (const word of ['load', 'error', 'open', 'close']) made.addEventListener(word, () => done(word));
});
(async () => {
  const post = more => fetch('TARGET/api/flows/', {method: 'POST', body, credentials: 'include', ...more});
  got.read = await fetch('TARGET/ui-settings').then(r => r.text(), name);
  got.simple = await post({mode: 'no-cors', headers: {'Content-Type': 'text/plain'}}).then(r => r.type, name);
  got.json = await post({headers: {'Content-Type': 'application/json'}}).then(r => r.text(), name);
  for (const [what, tag, path] of [['image', 'img', '/ico/favicon-32x32.png'], ['script', 'script', '/openapi.json']]) {
    const made = document.createElement(tag);
    const end = kind(made);
    made.src = 'TARGET' + path;
    document.body.append(made);
    got[what] = await end;
  }
  got.socket = await kind(new WebSocket('TARGET/api/events/out'.replace('http', 'ws'), 'prefect'));
  document.forms[0].submit();
  setTimeout(() => { document.title = 'done'; }, 1000);
})();
</script>"""
"""A page of another site: `got` says what it got."""


@pytest.fixture(scope="module")
def ui(tmp_path_factory):
    with Ui(tmp_path_factory.mktemp("prefect ui"), {}) as running:
        yield running


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_person_logs_in_on_the_page(ui, tmp_path, host):
    """By either name of this machine: the pages ask the host that served them. A wrong password opens nothing."""
    other = chromium.Browser(tmp_path)
    try:
        page = Page(other, f"http://{host}:{ui.port}/work-pools")
        for password in ("outliers:guessed", ui.password):
            page.until("document.querySelector('input[type=password]') !== null", "field for the password")
            page.value("{const e = document.querySelector('input[type=password]'); e.focus(); e.select(); true}")
            page.call("Input.insertText", text=password)
            assert "Work Pools" not in page.text()
            page.click("Login", "button")
            if password != ui.password:
                page.see("Authentication failed")
        page.see("Work Pools", "outliers")
        assert page.value("location.pathname") == "/work-pools"
        page.close()
    finally:
        other.close()


def test_a_page_of_another_origin_gets_nothing(ui, logged_in, tmp_path):
    """In a browser that is logged in: by what scripts, forms, frames and sockets can do, on a server of its own."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "index.html").write_text(EVIL.replace("TARGET", ui.url))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as evil:
        threading.Thread(target=evil.serve_forever, daemon=True).start()
        before = {flow["name"] for flow in ui.post("/flows/filter", {})}
        page = Page(logged_in, f"http://localhost:{evil.server_port}/index.html")
        page.until("document.title === 'done'", "end of the attack")
        assert page.value("window.got") == {
            "read": "TypeError",
            "simple": "TypeError",
            "json": "TypeError",
            "image": "error",
            "script": "error",
            "socket": "error",
        }
        assert {flow["name"] for flow in ui.post("/flows/filter", {})} == before
        page.close()
        evil.shutdown()
