"""What stands before llama.cpp's server: a key, a list of hosts and paths, and limits on what one request may cost.

llama.cpp's own server answers any Host, reads bodies of any size and compiles any grammar (100,000 brackets end the
process). It listens on a port that nobody is told, with a key of its own; this one is the address that clients get.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import threading
import weakref
from typing import Any

HOSTS = ("127.0.0.1", "localhost", "[::1]")
GET = ("/health", "/v1/health", "/models", "/v1/models", "/props")
POST = (
    *("/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion"),
    *("/tokenize", "/detokenize", "/apply-template", "/v1/responses", "/v1/messages"),
)
OPEN = ("/health", "/v1/health")  # answered without a key
BODY_BYTES = 4 << 20  # 4 MiB: a context of 128,000 tokens is about 0.5
GRAMMAR_CHARS, GRAMMAR_DEPTH = 64_000, 64  # of a grammar, a schema or a list of tools
CONNECTIONS, IN_FLIGHT = 128, 32
FIRST_REQUEST_S, BODY_S = 10, 30  # a connection that says nothing, or only half of something, is closed
GRAMMARS = ("grammar", "json_schema", "response_format", "tools", "functions")
LENGTHS = ("max_tokens", "max_completion_tokens", "n_predict", "max_output_tokens")
COUNTS = {"n": 8, "n_probs": 100, "top_logprobs": 100}


class Refused(Exception):
    """A request that goes no further. status: of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def start(port: int, key: str, inner: str, inner_key: str, model: str, context: int) -> str:
    """Listen on 127.0.0.1:`port` (0: any free one) in a thread until the process ends; the address.

    key: what clients have to send. inner: llama.cpp's address, with its key. model: the one name that is served.
    context: tokens, the most that one answer may have. Raises OSError for a port that cannot be had.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="gateway", daemon=True).start()
    gateway = Gateway(key, inner, inner_key, model, context)
    listening = asyncio.run_coroutine_threadsafe(gateway.listen(port), loop)
    return f"http://127.0.0.1:{listening.result(30)}"


class Gateway:
    """An aiohttp server that hands on what it does not refuse; see `start`."""

    def __init__(self, key: str, inner: str, inner_key: str, model: str, context: int) -> None:
        self.key, self.inner, self.model, self.context = key, inner, model, context
        self.inner_headers = {"Authorization": f"Bearer {inner_key}"}
        self.spoken: weakref.WeakSet[Any] = weakref.WeakSet()  # connections on which a whole request head has come
        self.in_flight = 0

    async def listen(self, port: int) -> int:
        """The port that is listened on."""
        from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

        self.session = ClientSession(timeout=ClientTimeout(total=None), connector=TCPConnector(limit=IN_FLIGHT))
        server = web.Server(self._answer, access_log=None, max_line_size=8190, max_headers=64)
        loop = asyncio.get_running_loop()

        def connected() -> Any:
            connection = server()
            if len(server.connections) >= CONNECTIONS:
                loop.call_soon(self._close, connection)
            else:
                loop.call_later(FIRST_REQUEST_S, self._close, connection, True)
            return connection

        listening = await loop.create_server(connected, "127.0.0.1", port)
        return listening.sockets[0].getsockname()[1]

    def _close(self, connection: Any, if_silent: bool = False) -> None:
        if connection.transport is not None and not (if_silent and connection.transport in self.spoken):
            connection.transport.close()

    async def _answer(self, request: Any) -> Any:
        from aiohttp import ClientError, web

        self.spoken.add(request.transport)
        self.in_flight += 1
        try:
            body = await self._checked(request)
            headers = self.inner_headers | {"Content-Type": "application/json"}
            url = self.inner + request.path
            async with self.session.request(request.method, url, data=body, headers=headers) as reply:
                answer = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.content_type})
                await answer.prepare(request)
                async for piece in reply.content.iter_any():
                    await answer.write(piece)
                return answer
        except Refused as refused:
            said = {"error": {"code": refused.status, "message": str(refused), "type": "invalid_request_error"}}
            return web.json_response(said, status=refused.status, headers={"Connection": "close"})
        except ClientError as error:
            said = {"error": {"code": 502, "message": f"llama.cpp gave no answer ({error})", "type": "server_error"}}
            return web.json_response(said, status=502)
        finally:
            self.in_flight -= 1

    async def _checked(self, request: Any) -> bytes | None:
        """The body to hand on. Raises Refused."""
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if re.sub(r":\d+$", "", host) not in HOSTS:
            raise Refused(403, f"the Host {host[:80]!r} is not this machine's; use 127.0.0.1 or localhost")
        if origin is not None and re.sub(r":\d+$", "", origin.partition("://")[2]) not in HOSTS:
            raise Refused(403, "web pages of other origins may not ask this server")
        if request.path not in {"GET": GET, "POST": POST}.get(request.method, ()):
            raise Refused(404, f"{request.method} {request.path[:80]} is not served here")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")
        if request.path not in OPEN and not hmac.compare_digest(given, self.key.encode()):
            raise Refused(401, "the key is missing or wrong; it was printed where the server was started")
        if self.in_flight > IN_FLIGHT:
            raise Refused(429, f"{IN_FLIGHT} requests are being answered already; ask again later")
        if request.method == "GET":
            return None
        if request.content_type != "application/json":
            raise Refused(415, f"the content type {request.content_type[:80]!r} is not application/json")
        try:
            content = await asyncio.wait_for(self._read(request), BODY_S)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {BODY_S} s") from None
        try:
            body = json.loads(content)
            if not isinstance(body, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not valid JSON ({str(error)[:80]})") from None
        self._limit(body)
        return json.dumps(body).encode()

    async def _read(self, request: Any) -> bytes:
        content = bytearray()
        async for piece in request.content.iter_any():
            content += piece
            if len(content) > BODY_BYTES:
                raise Refused(413, f"the body is larger than {BODY_BYTES:,} bytes")
        return bytes(content)

    def _limit(self, body: dict[str, Any]) -> None:
        """Refuse what llama.cpp would choke on; cut what an answer may come to."""
        asked = body.get("model")
        if asked not in (None, "", self.model):
            raise Refused(404, f"the model {str(asked)[:80]!r} is not served here; it is {self.model!r}")
        for name in GRAMMARS:
            if (value := body.get(name)) is not None:
                size, depth = _extent(value)
                if size > GRAMMAR_CHARS or depth > GRAMMAR_DEPTH:
                    raise Refused(
                        400,
                        f"{name} has {size:,} characters, nested {depth} deep; {GRAMMAR_CHARS:,} and "
                        f"{GRAMMAR_DEPTH} are the most",
                    )
        for name, most in COUNTS.items():
            if isinstance(body.get(name), (int, float)) and body[name] > most:
                raise Refused(400, f"{name} is {body[name]}; at most {most:,}")
        given = [name for name in LENGTHS if body.get(name) is not None]
        for name in given or ["max_tokens"]:
            wanted = body.get(name, -1)
            if not isinstance(wanted, int):
                raise Refused(400, f"{name} is not a whole number")
            body[name] = self.context if wanted < 0 else min(wanted, self.context)


def _extent(value: Any) -> tuple[int, int]:
    """Characters of a value as JSON, and how deep brackets are nested in it, those of patterns and grammars too."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    depth = deepest = 0
    for char in text[: GRAMMAR_CHARS + 1]:
        depth += (char in "([{") - (char in ")]}" and depth > 0)
        deepest = max(deepest, depth)
    return len(text), deepest
