"""The server of `egrsd report --run RUN --serve`: one page on the loopback address, made anew when its runs have moved on.

Only this machine reaches it, and only who knows the secret part of the address: other users of the machine do not. The server
answers only requests that name it as their host. A page of another site can therefore not read it under its own name.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline.config import Run
from pipeline.errors import EgrsdError, UserError
from pipeline.report.collect import collect_all, waiting
from pipeline.report.page import apart, page
from pipeline.store.directory import Store

LOOK_S = 2.0  # between two looks at the runs
HOST = "127.0.0.1"


class Watched:
    """The page of some runs as they are now."""

    def __init__(self, runs: list[tuple[Store, Run]], compared: dict[str, Any] | None) -> None:
        self._runs, self._compared = runs, compared
        self._seen: Any = None
        self._lock = threading.Lock()
        self._document: dict[str, Any] = {}
        self._waits = True
        self.version, self.said = 0, ""

    def look(self) -> bool:
        """Make the document anew when a round, an evaluation, a policy or metrics have come. Returns whether it was made.

        What cannot be read at this moment, since a command writes it, is read at the next look.
        """
        seen = [_state(store) for store, _ in self._runs]
        if seen == self._seen:
            return False
        try:
            runs = [(store, store.load_run()) for store, _ in self._runs]
            document = collect_all(runs)
        except EgrsdError as error:
            if self._document and not self._waits:
                self.said = f"Not read at the last look: {error.what}."
                return False
            document = waiting(self._runs, f"{error.what}. This page shows it once it is there.")
        self._waits = "waiting" in document["runs"][0]
        with self._lock:
            self._seen, self.version, self.said = seen, self.version + 1, f"Live. As of {time.strftime('%H:%M:%S')}."
            self._document = document | {"compare": self._compared, "live": True, "version": self.version}
        return True

    def answer(self, name: str) -> tuple[str, bytes] | None:
        """Content type and content of a part: the page itself, its `state`, its `document`. None for any other name."""
        with self._lock:
            document, version, said = self._document, self.version, self.said
        if name == "":
            return "text/html; charset=utf-8", page(document)
        if name == "state":
            return "application/json", json.dumps({"version": version, "said": said}).encode()
        if name == "document":
            index, blocks = apart(document)
            return "application/json", json.dumps({"version": version, "document": index, "blocks": blocks}).encode()
        return None


def _state(store: Store) -> Any:
    """What a look compares: which rounds are committed, which evaluations and policies are there, and the files of metrics."""
    rounds = store.numbers("rounds")
    labelled = store.names(f"rounds/{rounds[-1]:04d}/label") if rounds else []
    evaluations = [(number, store.names(f"evals/{number:04d}/grade")) for number in store.numbers("evals")]
    return rounds, labelled, evaluations, store.numbers("policy"), store.names("metrics")


class Served:
    """A server that answers."""

    def __init__(self, watched: Watched, address: str) -> None:
        self.watched, self.address = watched, address

    def watch(self, say: Callable[[str], None], until: threading.Event | None = None) -> None:
        """Look at the runs again and again, until interrupted or told to end. A line says when the page has changed."""
        ended = until or threading.Event()
        while not ended.wait(LOOK_S):
            if self.watched.look():
                say(f"{time.strftime('%H:%M:%S')}: the page has what is new")


@contextlib.contextmanager
def serve(watched: Watched, port: int) -> Iterator[Served]:
    """Answer on the loopback address for the length of a block. Port 0 takes a free one. Raises UserError for a taken port."""
    watched.look()
    key = secrets.token_urlsafe(16)
    try:
        server = ThreadingHTTPServer((HOST, port), _handler(watched, key))
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror})", "--port", "Name another one, or 0 for any") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="report", daemon=True)
    thread.start()
    try:
        yield Served(watched, f"http://{HOST}:{server.server_port}/{key}/")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(watched: Watched, key: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET below the secret part of the address."""

        def do_GET(self) -> None:
            """One part of the page."""
            host, own = self.headers.get("Host", ""), f"{HOST}:{self.server.server_port}"  # type: ignore[attr-defined]
            begin, name = f"/{key}/", self.path.partition("?")[0]
            known = host in (own, own.replace(HOST, "localhost")) and secrets.compare_digest(
                name[: len(begin)].encode(), begin.encode()
            )
            found = watched.answer(name[len(begin) :]) if known else None
            if found is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, content = found
            self.send_response(HTTPStatus.OK)
            for header, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # who asked has left
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Say nothing: a page asks every two seconds."""

    return Handler


_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
