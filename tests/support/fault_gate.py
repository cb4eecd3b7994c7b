"""A door before the S3 server of the fault tests: it holds a publication in its middle, or answers for the store.

It speaks for a store that is busy or refuses these keys, which a real one does not do when a test asks. After it:
`fault_world`.
"""

from __future__ import annotations

import contextlib
import socket
import threading

PUTS = 3
"""A publication is held at this file of it."""


class Gate:
    """A door on a port of its own before the S3 server: open, held at a file, busy (503) or shut to us (403)."""

    _ANSWERS = {  # noqa: RUF012 - a constant
        "busy": (b"503 Slow Down", b"SlowDown", b"Please reduce your request rate."),
        "refuse": (b"403 Forbidden", b"AccessDenied", b"Access Denied"),
    }

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.mode = "open"
        self._left = 0
        self._free = threading.Event()
        self._free.set()
        self.held = 0
        """How many publications wait at the gate."""
        self.answered = 0
        """How many requests the gate answered itself."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.open()
        self._listener.close()

    def hold(self, puts: int = PUTS) -> None:
        """From now on: who puts its `puts`-th file waits, and all after."""
        self._left, self.held = puts - 1, 0
        self._free.clear()

    def open(self) -> None:
        """Everything passes."""
        self.mode = "open"
        self._free.set()

    def answer(self, mode: str) -> None:
        """From now on each request is answered as a busy store does ("busy"), or one that refuses these keys ("refuse")."""
        self.mode = mode
        self._free.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as server:
            threading.Thread(target=self._pass, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                begins = data.split(b" ", 1)[0] in (b"PUT", b"GET", b"POST", b"DELETE", b"HEAD")
                if data.startswith(b"PUT ") and not self._free.is_set():
                    self._left -= 1
                    if self._left < 0:
                        self.held += 1
                        self._free.wait()
                if begins and self.mode != "open":
                    self._say(client)
                    return
                server.sendall(data)

    def _say(self, client: socket.socket) -> None:
        line, code, text = self._ANSWERS[self.mode]
        body = b"<Error><Code>%s</Code><Message>%s</Message></Error>" % (code, text)
        head = b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        self.answered += 1
        client.sendall(head % (line, len(body)) + body)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass

    @staticmethod
    def _pass(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
