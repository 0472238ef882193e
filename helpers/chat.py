"""A small chat in the notebook with one served model, or with two side by side (base and tuned).

    chat.of_run("myrun")                     opens with the system prompt and some held-out questions of its data
    chat.show({"base": serve.start(base_gguf), "tuned": serve.start("myrun")}, system="You write SQL.")

Only what ipywidgets 7.7 and 8 share is used. Answers stream in; what a model writes is text, never markup; the query in
an answer is run, read-only, on the run's database.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers import display, machine, runs, serve
from helpers.display import escape, say, table
from helpers.errors import TunebookError
from helpers.gguf.runner import Server
from helpers.model import loading, offline
from helpers.tasks import sqlite_reader, text_to_sql

REDRAW_S = 0.1  # a widget message per token would flood the notebook's connection
BUBBLE = (
    "margin:4px 0;padding:6px 10px;border-radius:8px;border:1px solid rgba(128,128,128,.35);white-space:pre-wrap;"
    "overflow-wrap:anywhere;line-height:1.4"
)
CARD = "border:1px solid rgba(128,128,128,.45);border-radius:8px;padding:8px"
NEWEST = "max-height:26em;overflow-y:auto;display:flex;flex-direction:column-reverse"  # turned over: stays at the end
SHOWN_ROWS = 8  # of what a query returns
SIDES = {"user": "background:rgba(80,130,240,.13);margin-left:12%", "assistant": "margin-right:12%"}
Message = dict[str, str]
Servers = Mapping[str, Server | str]


def stream(server: Server | str, model: str, messages: list[Message], temperature: float, most: int) -> Iterator[str]:
    """The answer of at most `most` tokens in the pieces in which it comes; of a model without a chat template what it
    writes behind the last message."""
    client, talks = serve.client(server), serve.talks(server)
    model = server.path.stem if isinstance(server, Server) else model
    create: Any = client.chat.completions.create if talks else client.completions.create
    asked = {"messages": messages} if talks else {"prompt": messages[-1]["content"]}
    with create(model=model, temperature=temperature, max_tokens=most, stream=True, **asked) as events:
        for event in events:
            said = event.choices and (event.choices[0].delta.content if talks else event.choices[0].text)
            yield said or ""


class Chat:
    """The widgets and their buttons. `view` is what a notebook displays; `send`, `stop` and `clear` do what the buttons
    do.

    Of each model by its name: said, the conversation without the system prompt; notes, how its last answer went;
    returned, what the query in an answer gave, by the answer's place; boxes, its side of the view.
    """

    def __init__(self, servers: Servers, system: str, heat: float, most: int, examples: Any = (), database: Any = None):
        import ipywidgets as w

        self.servers, self.temperature, self.max_tokens = servers, heat, most
        self.said: dict[str, list[Message]] = {}
        self.notes: dict[str, str] = {}
        self.returned: dict[str, dict[int, str]] = {}
        self._stop, self._asking = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._database = sqlite_reader.open_readonly(database) if database else None
        wide, wraps = w.Layout(width="auto"), w.Layout(width="100%", flex_flow="row wrap")
        self.boxes = {name: w.HTML(layout=w.Layout(flex="1 1 260px", margin="4px")) for name in servers}
        self.system = w.Textarea(value=system, placeholder="empty: the model's own", layout=wide, rows=3)
        line = w.Layout(flex="1 1 240px", width="auto")
        self.question = w.Text(placeholder="Ask something; Enter sends", layout=line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the one way to hear Enter that 7.7 and 8 share
            self.question.on_submit(lambda _: self._on_send())
        actions = {"Send": self._on_send, "Stop": self.stop, "Clear": self.clear}
        self.buttons = {name: w.Button(description=name, layout=w.Layout(width="5em")) for name in actions}
        for name, action in actions.items():
            self.buttons[name].on_click(lambda _, action=action: action())
        shape = w.Layout(width="auto", max_width="100%")
        self.examples = [w.Button(description=text, tooltip=text, layout=shape) for text in examples]
        for button in self.examples:
            button.on_click(lambda pressed: None if self.busy() else self.send(pressed.description))
        prompt = "<b>System prompt</b>" + ", as the data has it" * bool(system)
        named = [w.HTML("<b>Held-out questions</b>"), w.HBox(self.examples, layout=wraps)] if examples else []
        below = w.HBox([self.question, *self.buttons.values()], layout=wraps)
        sides = w.HBox(list(self.boxes.values()), layout=wraps)
        self.view = w.VBox([w.HTML(prompt), self.system, *named, sides, below], layout=w.Layout(width="100%"))
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
            self.notes[name] = f"no answer: {_why(error)}"
        if not answer["content"]:
            said.pop()
        elif returned := self._run(answer["content"]):
            self.returned[name][len(said) - 1] = returned
        self._draw(name)

    def _run(self, answer: str) -> str:
        """What the query in an answer returns, as HTML; "" without a query or a database."""
        with self._asking:  # both models' answers go through one child process
            sql = text_to_sql.extract(answer) if self._database else None
            if not sql or not self._database:
                return ""
            found = sqlite_reader.execute(self._database, sql)
        if not found.ok:
            return f"The query does not run: {escape(found.error)}"
        more = f", of which {SHOWN_ROWS} are shown" * (len(found.rows) > SHOWN_ROWS)
        rows = f"{len(found.rows):,} row{'s' * (len(found.rows) != 1)}{more}"
        shown = table(found.rows[:SHOWN_ROWS], found.columns) if found.rows else ""
        return f"The query returns {rows}{':' if shown else '.'}{shown}"

    def _draw(self, name: str) -> None:
        turns = ""
        for place, turn in enumerate(self.said[name]):
            turns += f'<div style="{BUBBLE};{SIDES[turn["role"]]}">{escape(turn["content"])}</div>'
            if returned := self.returned[name].get(place):
                turns += f'<div style="overflow-x:auto;margin:0 12% 8px 6px">{returned}</div>'
        self.boxes[name].value = (
            f'<div style="{CARD}"><div style="font-weight:600">{escape(name)}</div>'
            f'<div style="{NEWEST}"><div>{turns}</div></div>'
            f'<div style="opacity:.7;font-size:90%">{escape(self.notes[name] or "no answer yet")}</div></div>'
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
            self.said[name], self.notes[name], self.returned[name] = [], "", {}
            self._draw(name)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view)


def show(servers: Any, system: str = "", temperature: float = 0.0, max_tokens: int = 256, **opening: Any) -> Chat:
    """A chat with one server or OpenAI-compatible URL, or with several side by side, as name -> server.

    opening: examples, questions to press, and database, the SQLite file that queries in answers are run on.
    """
    if not isinstance(servers, Mapping):
        servers = {getattr(getattr(servers, "path", None), "stem", "model"): servers}
    return Chat(servers, system, temperature, max_tokens, **opening)


def of_run(run: str) -> Any:
    """`offer` of a run's recommended file beside its base, with the opening of its data."""
    try:
        base = runs.load(run, "gguf", verify=False).metrics["base"]
        return offer(serve.find(run), base, **opening(run))
    except TunebookError as error:
        return display.said(f"There is no file to talk to. {error}")


def opening(run: str, count: int = 3) -> dict[str, Any]:
    """How a chat with a run's model begins: the system prompt that most of its held-out rows have, some questions
    asked under it, and the database to run queries on."""
    import pyarrow.parquet as pq

    folder, asked = runs.load(run, "data", verify=False).path, []
    for file in (folder / "test.parquet", folder / "eval.parquet"):
        held = file.is_file() and "messages" in pq.read_schema(file).names
        for text in pq.read_table(file, columns=["messages"])["messages"].to_pylist() if held else ():
            turns = [turn for turn in json.loads(text or "[]") if isinstance(turn.get("content"), str)]
            said = {turn["role"]: turn["content"] for turn in turns[:2]}
            asked += [(said.get("system", ""), said["user"])] if "user" in said else []
        if asked:
            break
    system = Counter(system for system, _ in asked).most_common(1)[0][0] if asked else ""
    known = list(dict.fromkeys(question for under, question in asked if under == system))
    examples = known[:: max(1, len(known) // count)][:count]
    database = folder / "database.sqlite"
    return {"system": system, "examples": examples, "database": database if database.is_file() else None}


def offer(gguf: str | Path, base: str | Path = "", system: str = "", **opening: Any) -> Chat | None:
    """In a notebook that somebody watches: serve an exported file and chat with it, beside the base where possible.

    base: a GGUF file, or the base model's name (the default model's GGUF is at hand offline; of another, name a
    file). Headless it starts nothing and prints the command that serves the file.
    """
    if not machine.interactive():
        say(f"To talk to it: python -m helpers.serve {gguf}")
        return None
    if base == loading.DEFAULT_MODEL:
        try:
            base = offline.wheel_gguf()
        except TunebookError as error:
            say(f"The base is left out. {error}")
    servers = {"base": serve.start(base)} if str(base).endswith(".gguf") else {}
    return show({**servers, "tuned": serve.start(gguf)}, system, **opening)


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """A conversation in the terminal; an empty line ends it."""
    parser = argparse.ArgumentParser(prog="tunebook chat", description="Talk to a run's export or a GGUF file.")
    parser.add_argument("what", help="a GGUF file, a folder that holds one, or the name of a run")
    parser.add_argument("--system", default="", help="system prompt; none takes that of the run's data")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer, in tokens (default 512)")
    options = parser.parse_args(arguments)
    system = options.system
    with contextlib.suppress(TunebookError):  # a file, no run
        system = system or opening(options.what)["system"]
    said = [{"role": "system", "content": system}] if system else []
    try:
        server = serve.start(options.what)
        if not serve.talks(server):
            say("The model completes plain text: it has no chat template, and goes on with what you write.")
        while question := input("> ").strip():
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
            try:
                for piece in stream(server, server.path.stem, said[:-1], 0.0, options.max_tokens):
                    said[-1]["content"] += piece
                    say(piece, end="")
                say()
            except Exception as error:  # a question too long for the context, say; the next one may be shorter
                say(f"No answer: {_why(error)}")
                del said[-2:]
    except (EOFError, KeyboardInterrupt):
        say()
    finally:
        serve.stop_all()
    return 0
