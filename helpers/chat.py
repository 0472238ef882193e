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
from helpers.display import clean, escape
from helpers.gguf.runner import Server
from helpers.model import loading, offline

REDRAW_S = 0.1  # a widget message per token would flood the notebook's connection
BUBBLE = (
    "margin:4px 0;padding:6px 10px;border-radius:8px;border:1px solid rgba(128,128,128,.35);white-space:pre-wrap;"
    "overflow-wrap:anywhere;line-height:1.4"
)
Message = dict[str, str]


def stream(
    server: Server | str, model: str, messages: list[Message], temperature: float, max_tokens: int
) -> Iterator[tuple[str, bool]]:
    """(piece of the answer, whether it was cut off at `max_tokens`) as they come."""
    create = serve.client(server).chat.completions.create
    with create(model=model, messages=messages, temperature=temperature, max_tokens=max_tokens, stream=True) as events:
        for choice in (event.choices[0] for event in events if event.choices):
            yield choice.delta.content or "", choice.finish_reason == "length"


class Column:
    """One model's side of the conversation. messages: what was said so far, without the system prompt."""

    def __init__(self, name: str, server: Server | str):
        import ipywidgets as w

        self.name, self.server, self.note = name, server, ""
        self.messages: list[Message] = []
        self.box = w.HTML(layout=w.Layout(width="100%"))
        self.draw()

    def ask(self, question: str, system: str, temperature: float, max_tokens: int, stop: threading.Event) -> None:
        """Send the conversation with `question` and stream the answer into the box until it ends or `stop` is set."""
        self.messages.append({"role": "user", "content": question})
        sent = ([{"role": "system", "content": system}] if system.strip() else []) + self.messages
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        self.note, began, drawn, pieces = "…", time.monotonic(), 0.0, 0
        try:
            for piece, cut_off in stream(self.server, self.name, sent, temperature, max_tokens):
                if stop.is_set():
                    self.note = "stopped"
                    return
                answer["content"] += piece
                pieces += bool(piece)
                if time.monotonic() - drawn > REDRAW_S:
                    drawn = time.monotonic()
                    self.draw()
                if cut_off:
                    self.note = f"cut off at {max_tokens} tokens"
            if self.note == "…":
                self.note = f"{pieces} tokens, {pieces / max(time.monotonic() - began, 1e-6):.0f} a second"
        except Exception as error:  # whatever the network or the server does; the other column continues
            self.note = f"no answer: {' '.join(str(error).split())[:300] or type(error).__name__}"
        finally:
            if not answer["content"]:
                self.messages.pop()
            self.draw()

    def clear(self) -> None:
        self.messages.clear()
        self.note = ""
        self.draw()

    def draw(self) -> None:
        side = {"user": "background:rgba(80,130,240,.13);margin-left:12%", "assistant": "margin-right:12%"}
        turns = [f'<div style="{BUBBLE};{side[m["role"]]}">{escape(m["content"])}</div>' for m in self.messages]
        self.box.value = (
            f'<div style="font-weight:600">{escape(self.name)}</div>'
            f'<div style="max-height:26em;overflow-y:auto">{"".join(turns)}</div>'
            f'<div style="opacity:.7;font-size:90%">{escape(self.note)}</div>'
        )


class Chat:
    """The widgets and their buttons. `view` is what a notebook displays; `send` and `stop` do what the buttons do."""

    def __init__(
        self, servers: Mapping[str, Server | str], system: str = "", temperature: float = 0.0, max_tokens: int = 256
    ):
        import ipywidgets as w

        self.columns = [Column(name, server) for name, server in servers.items()]
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        wide, named = w.Layout(width="100%"), {"style": {"description_width": "initial"}}
        empty = "System prompt (empty: the model's own)"
        self.system = w.Textarea(value=system, placeholder=empty, layout=wide, rows=2)
        self.question = w.Textarea(placeholder="Ask something", layout=wide, rows=2)
        self.temperature = w.FloatSlider(temperature, min=0.0, max=2.0, step=0.1, description="temperature", **named)
        self.max_tokens = w.IntSlider(max_tokens, min=16, max=2048, step=16, description="max tokens", **named)
        self.buttons = {}
        for name, action in (("Send", self._on_send), ("Stop", self.stop), ("Clear", self.clear)):
            self.buttons[name] = w.Button(description=name, button_style="primary" if name == "Send" else "")
            self.buttons[name].on_click(lambda _, action=action: action())
        controls = [*self.buttons.values(), self.temperature, self.max_tokens]
        columns = w.HBox([c.box for c in self.columns], layout=wide)
        below = w.HBox(controls, layout=w.Layout(flex_flow="row wrap"))
        self.view = w.VBox([self.system, columns, self.question, below], layout=wide)

    def _on_send(self) -> None:
        if self.question.value.strip() and not self.busy():
            question, self.question.value = self.question.value, ""
            self.send(question)

    def send(self, question: str) -> None:
        """Ask every model at once; returns at once."""
        self.stop()
        self.wait()
        self._stop = threading.Event()
        said = (question, self.system.value, self.temperature.value, self.max_tokens.value, self._stop)
        self._threads = [threading.Thread(target=c.ask, daemon=True, args=said) for c in self.columns]
        for thread in self._threads:
            thread.start()

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
        self.stop()
        self.wait(5)
        for column in self.columns:
            column.clear()

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
        print(f"To talk to it: python -m helpers.serve {gguf}")
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
    try:
        server = serve.start(options.what)
        said = [{"role": "system", "content": options.system}] if options.system else []
        while question := input("> ").strip():
            said.append({"role": "user", "content": question})
            answer = ""
            for piece, _ in stream(server, server.path.stem, said, 0.0, options.max_tokens):
                answer += piece
                print(clean(piece), end="", flush=True)
            print()
            said.append({"role": "assistant", "content": answer})
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        serve.stop_all()
    return 0
