"""A small server of a test's own: answers with what functions return."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Routes:
    """Serves `routes`: functions by path, each called with the body; `asked` has the paths in their order.

    A function that raises is an answer of 500 with its words, as vLLM and SGLang give it.
    """

    def __init__(self, routes):
        self.routes, self.asked = routes, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                outer.asked.append(self.path)
                try:
                    status, said = 200, outer.routes[self.path](body)
                except KeyError:
                    status, said = 404, {"detail": "Not Found"}
                except Exception as error:
                    status, said = 500, {"error": str(error)}
                text = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
