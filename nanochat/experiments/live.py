"""A report served on the loopback address while its runs go on: drawn anew from their records, reloaded by the browser.

Reads records alone; takes at most a twentieth of one core, and little of that at the runs' cost.
"""

import html
import os
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from markupsafe import Markup

from nanochat.common import UserError
from nanochat.experiments.runs.watch import SHARE_OF_A_CORE

ADDRESS = "127.0.0.1"
RELOAD_SEC = 10
_FAULT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>not shown</title>
<main><h1>Not shown</h1><p>{}</p></main></html>"""
_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
           "frame-ancestors 'none'")


class LivePage:
    """The newest page of report(), a function that makes a Report: drawn when somebody asks, and seldom enough."""

    def __init__(self, report):
        self.report, self.is_over, self.reload_sec = report, False, RELOAD_SEC
        self._lock, self._pages, self._drawn_at = threading.Lock(), {}, None

    def get(self, is_still):
        """(status, page). is_still: without the browser's reload. A record that cannot be read is the page's text."""
        with self._lock:
            if self._drawn_at is None or time.monotonic() - self._drawn_at >= self.reload_sec:
                self._draw()
            return self._pages[is_still]

    def _draw(self):
        began = time.thread_time()
        try:
            report = self.report()
            self.is_over = report.is_over
            self._pages = {still: (HTTPStatus.OK, report.html(live=self._words(still))) for still in (False, True)}
        except (UserError, OSError) as error:  # it may be mended, or whole again, meanwhile
            page = _FAULT.format(html.escape(str(error)))
            self._pages = dict.fromkeys((False, True), (HTTPStatus.SERVICE_UNAVAILABLE, page))
        self.reload_sec = max(RELOAD_SEC, round((time.thread_time() - began) / SHARE_OF_A_CORE))
        self._drawn_at = time.monotonic()

    def _words(self, is_still):
        at = time.strftime("%H:%M:%S")
        if self.is_over:
            return f"as of {at}; no run of it is running any more"
        return (Markup('as of {}, held still; <a href="/">follow the runs</a>') if is_still else Markup(
            'as of {}, comes again by itself; <a href="/?still">hold it still</a>')).format(at)


class _Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds that a silent client holds a thread
    server_version, sys_version = "nanochat", ""

    def do_GET(self):
        """The page under / and /?still, for this host's own name alone: another name in Host is another site's page
        that had its name lead here (DNS rebinding)."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            return self.send_error(HTTPStatus.FORBIDDEN, "This page is for its own machine")
        if self.path not in ("/", "/?still"):
            return self.send_error(HTTPStatus.NOT_FOUND)
        is_still = self.path != "/"
        status, page = self.server.page.get(is_still)
        data = page.encode()
        self.send_response(status)
        for name, value in (("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(data))),
                            ("Cache-Control", "no-store"), ("Content-Security-Policy", _POLICY),
                            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")):
            self.send_header(name, value)
        if not (is_still or self.server.page.is_over):
            self.send_header("Refresh", str(self.server.page.reload_sec))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    do_HEAD = do_GET

    def log_message(self, *_):
        """Nothing: the terminal is the person's."""


class LiveServer(ThreadingHTTPServer):
    """Serves a LivePage at `url` from when it is made. port 0: any that is free. Errors: UserError when it is taken."""

    daemon_threads = True

    def __init__(self, report, port=0):
        self.page = LivePage(report)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port} cannot be had ({getattr(error, 'strerror', error)}); give another, or 0 "
                            "for any that is free") from None
        self.url = f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request, client_address):
        """A client that went away is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def run(self):
        """Serve until Ctrl-C, after the runs in the queue for the processor."""
        os.nice(10)
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.server_close()
