"""What the tests' servers of the hub's protocol share: how they answer, and that they say nothing."""

from http.server import BaseHTTPRequestHandler


class Answering(BaseHTTPRequestHandler):
    """Subclasses have `do_GET`, which ends in `answer`; a HEAD is the same without the body."""

    def do_HEAD(self):
        self.do_GET()

    def answer(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
