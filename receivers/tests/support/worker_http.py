"""How a worker of the tests answers: one question after the other, as an engine does."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer


def serve(answer):
    """Says on which port it listens, and answers with the status and the JSON that `answer(path, told)` returns."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                status, said = answer(self.path.split("?")[0], json.loads(text) if text else None)
            except Exception as error:
                status, said = 400, {"success": False, "message": f"{type(error).__name__}: {error}"}
            said = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
