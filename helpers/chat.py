"""A small chat in the notebook with one served model, or with two side by side (base and tuned).

    chat.show(serve.start("myrun"))
    chat.show({"base": serve.start(base_gguf), "tuned": serve.start("myrun")}, system="You write SQL.")

Only what ipywidgets 7.7 and 8 share is used. Answers stream in; what a model writes is text, never markup.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers import machine, serve
from helpers.display import escape, say
from helpers.gguf.runner import Server
from helpers.model import loading, offline

REDRAW_S = 0.1  # a widget message per token would flood the notebook's connection
BUBBLE = (
    "margin:4px 0;padding:6px 10px;border-radius:8px;border:1px solid rgba(128,128,128,.35);white-space:pre-wrap;"
    "overflow-wrap:anywhere;line-height:1.4"
)
SIDES = {"user": "background:rgba(80,130,240,.13);margin-left:12%", "assistant": "margin-right:12%"}
Message = dict[str, str]


def stream(server: Server | str, model: str, messages: list[Message], temperature: float, most: int) -> Iterator[str]:
    """The answer of at most `most` tokens in the pieces in which it comes."""
    create = serve.client(server).chat.completions.create
    model = server.path.stem if isinstance(server, Server) else model
    with create(model=model, messages=messages, temperature=temperature, max_tokens=most, stream=True) as events:
        for event in events:
            yield (event.choices[0].delta.content or "") if event.choices else ""


class Chat:
    """The widgets and their buttons. `view` is what a notebook displays; `send`, `stop` and `clear` do what the buttons
    do.

    Of each model by its name: said, the conversation without the system prompt; notes, how its last answer went;
    boxes, its side of the view.
    """

    def __init__(self, servers: Mapping[str, Server | str], system: str, temperature: float, max_tokens: int):
        import ipywidgets as w

        self.servers, self.temperature, self.max_tokens = servers, temperature, max_tokens
        self.said: dict[str, list[Message]] = {}
        self.notes: dict[str, str] = {}
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        wide = w.Layout(width="100%")
        self.boxes = {name: w.HTML(layout=wide) for name in servers}
        empty = "System prompt (empty: the model's own)"
        self.system = w.Textarea(value=system, placeholder=empty, layout=wide, rows=2)
        self.question = w.Textarea(placeholder="Ask something", layout=wide, rows=2)
        self.buttons = {name: w.Button(description=name) for name in ("Send", "Stop", "Clear")}
        for button, action in zip(self.buttons.values(), (self._on_send, self.stop, self.clear), strict=True):
            button.on_click(lambda _, action=action: action())
        sides, below = w.HBox(list(self.boxes.values()), layout=wide), w.HBox(list(self.buttons.values()))
        self.view = w.VBox([self.system, sides, self.question, below], layout=wide)
        self.clear()

    def _on_send(self) -> None:
        if self.question.value.strip() and not self.busy():
            question, self.question.value = self.question.value, ""
            self.send(question)

    def send(self, question: str) -> None:
        """Ask every model at once; returns at once."""
        self.stop()
        self.wait()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(name, question, self._stop), daemon=True) for name in self.servers
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, name: str, question: str, stop: threading.Event) -> None:
        """Ask one model and stream the answer into its box until it ends or `stop` is set."""
        said, answer, drawn = self.said[name], {"role": "assistant", "content": ""}, 0.0
        said.append({"role": "user", "content": question})
        system = [{"role": "system", "content": self.system.value}] if self.system.value.strip() else []
        pieces = stream(self.servers[name], name, system + said, self.temperature, self.max_tokens)
        said.append(answer)
        try:
            for count, piece in enumerate(pieces):
                answer["content"] += piece
                self.notes[name] = f"{count} tokens"
                if stop.is_set():
                    self.notes[name] = "stopped"
                    break
                if time.monotonic() - drawn > REDRAW_S:
                    drawn = time.monotonic()
                    self._draw(name)
        except Exception as error:  # whatever the network or the server does; the other model continues
            self.notes[name] = f"no answer: {' '.join(str(error).split())[:300] or type(error).__name__}"
        if not answer["content"]:
            said.pop()
        self._draw(name)

    def _draw(self, name: str) -> None:
        turns = [f'<div style="{BUBBLE};{SIDES[m["role"]]}">{escape(m["content"])}</div>' for m in self.said[name]]
        self.boxes[name].value = (
            f'<div style="font-weight:600">{escape(name)}</div>'
            f'<div style="max-height:26em;overflow-y:auto">{"".join(turns)}</div>'
            f'<div style="opacity:.7;font-size:90%">{escape(self.notes[name])}</div>'
        )

    def busy(self) -> bool:
        return any(t.is_alive() for t in self._threads)

    def stop(self) -> None:
        """Stop the answers that are being written; what is there stays."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when every answer has ended."""
        for thread in self._threads:
            thread.join(timeout_s)

    def clear(self) -> None:
        """Begin anew."""
        self.stop()
        self.wait(5)
        for name in self.servers:
            self.said[name], self.notes[name] = [], ""
            self._draw(name)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view)


def show(servers: Any, system: str = "", temperature: float = 0.0, max_tokens: int = 256) -> Chat:
    """A chat with one server or OpenAI-compatible URL, or with several side by side, as name -> server."""
    if not isinstance(servers, Mapping):
        servers = {getattr(getattr(servers, "path", None), "stem", "model"): servers}
    return Chat(servers, system, temperature, max_tokens)


def offer(gguf: str | Path, base: str | Path = "", system: str = "") -> Chat | None:
    """In a notebook that somebody watches: serve an exported file and chat with it, beside the base where possible.

    base: a GGUF file, or the base model's name (the default model's GGUF is at hand offline; of another, name a
    file). Headless it starts nothing and prints the command that serves the file.
    """
    if not machine.interactive():
        say(f"To talk to it: python -m helpers.serve {gguf}")
        return None
    if base == loading.DEFAULT_MODEL:
        base = offline.wheel_gguf()
    servers = {"base": serve.start(base)} if str(base).endswith(".gguf") else {}
    return show({**servers, "tuned": serve.start(gguf)}, system=system)


def main(arguments: list[str] | None = None) -> int:
    """A conversation in the terminal; an empty line ends it."""
    parser = argparse.ArgumentParser(prog="tunebook chat", description="Talk to a run's export or a GGUF file.")
    parser.add_argument("what", help="a GGUF file, a folder that holds one, or the name of a run")
    parser.add_argument("--system", default="", help="system prompt; none takes the model's own")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer, in tokens (default 512)")
    options = parser.parse_args(arguments)
    said = [{"role": "system", "content": options.system}] if options.system else []
    try:
        server = serve.start(options.what)
        while question := input("> ").strip():
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
            for piece in stream(server, server.path.stem, said[:-1], 0.0, options.max_tokens):
                said[-1]["content"] += piece
                say(piece, end="")
            say()
    except (EOFError, KeyboardInterrupt):
        say()
    finally:
        serve.stop_all()
    return 0
