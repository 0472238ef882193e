"""A proxy before an OpenAI-compatible server: counts the questions, answers the first ones itself, with faults."""

import http.server
import json
import os
import threading
import urllib.error
import urllib.request

from helpers import llm_client

PROBE = llm_client.PROBE.messages[0]["content"].encode()


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the server at `upstream`; the first are answered with `faults`: (status, headers).

    bodies: the questions so far, without those that only find out what is served.
    """

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.faults, self.bodies, self.running, self.most = upstream, [], [], 0, 0
        self.lock, self.keys = threading.Lock(), set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(*self.passed_on(None))

    def do_POST(self):
        proxy, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if PROBE in body:
            return self.reply(*self.passed_on(body))
        with proxy.lock:
            proxy.bodies.append(body)
            proxy.keys.add(self.headers.get("Authorization"))
            fault = proxy.faults.pop(0) if proxy.faults else None
            proxy.running += 1
            proxy.most = max(proxy.most, proxy.running)
        if fault == "hang up":
            self.close_connection = True
        elif fault:
            self.reply(fault[0], json.dumps({"error": {"message": f"planted fault {fault[0]}"}}).encode(), fault[1])
        else:
            self.reply(*self.passed_on(body))
        with proxy.lock:
            proxy.running -= 1

    def passed_on(self, body):
        kind = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['TUNEBOOK_SERVER_KEY']}"}
        request = urllib.request.Request(self.server.upstream + self.path, body, kind)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return 200, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def reply(self, status, content, headers=()):
        try:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": len(content),
                **dict(headers),
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed

    def log_message(self, *_):
        pass
