"""What other runtimes need to run the exported model as it was trained: an Ollama Modelfile, and exact commands.

The Modelfile is explicit (template in Go, stops, context, sampling), because Ollama's own guess replaces the model's
template by a stock one. The template is derived and compared in `helpers.gguf.go_template`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from helpers import display
from helpers.errors import TunebookError
from helpers.gguf import go_template
from helpers.model import loading
from helpers.model.stop_tokens import stop_tokens
from helpers.runs import write_atomic

LONGEST_CONTEXT = (
    8192  # tokens; a context costs memory in every runtime, so a model's millions are not asked for by default
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NO_GO = (
    "The chat template cannot be said in Ollama's Go template: {}. Serve the GGUF with llama.cpp or the merged model "
    "with vLLM, which run the Jinja itself."
)


@dataclass(repr=False)
class Modelfile:
    """An Ollama Modelfile and how far its template is the model's own.

    path: None when the Jinja template cannot be said in Go (`reason` tells why); then nothing was written. checks: the
    conversation shapes compared. notes: what differs in shapes this job may not use.
    """

    reason: str = ""
    template: str = ""
    checks: list[go_template.Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    path: Path | None = None
    stops: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For manifests: no text, only what was found."""
        return {
            "written": self.path.name if self.path else None,
            "reason": self.reason,
            "stops": self.stops,
            "parameters": self.parameters,
            "shapes_equal": [c.shape for c in self.checks if c.equal],
            "shapes_different": [c.shape for c in self.checks if not c.equal],
            "notes": self.notes,
        }

    def _rows(self) -> list[tuple[str, str]]:
        refused = "refused by the model's own template"
        return [(c.shape, "same prompt" if c.equal else refused if c.jinja is None else "differs") for c in self.checks]

    def _repr_html_(self) -> str:
        lines = [display.table(self._rows(), ("conversation", "Go template against Jinja"))]
        lines += [f"<p>{display.escape(text)}</p>" for text in (self.reason, *self.notes) if text]
        lines += [f"<h4>{display.escape(k)}</h4><pre>{display.escape(v)}</pre>" for k, v in self.commands.items()]
        return "".join(lines)

    def __repr__(self) -> str:
        commands = [f"{runtime}\n{command}" for runtime, command in self.commands.items()]
        return "\n\n".join(filter(None, [display.text_table(self._rows()), self.reason, *self.notes, *commands]))


def write(
    merged: Path, gguf: Path, out: Path, *, name: str = "tunebook", context: int = 0, system: str = ""
) -> Modelfile:
    """Write the Modelfile for `gguf` to `out` and compare its template with the model's own on every shape.

    merged: the 16-bit model folder with tokenizer and chat template. name: what the model shall be called there.
    context: tokens; 0 takes the model's, at most 8192. Sampling is generation_config.json's, greedy where that says
    nothing: so it was measured. system: a SYSTEM line, "" leaves the template's own default. Raises TunebookError for
    a missing template, an unusable path or a name that a shell or Ollama would trip over.
    """
    check_name(name)
    if not gguf.is_file():
        raise TunebookError(f"There is no GGUF file at {gguf}; run 04_gguf_export first.")
    tokenizer = loading.load_tokenizer(merged)
    if not tokenizer.chat_template:
        raise TunebookError(
            f"The tokenizer in {merged} has no chat template, so no runtime can know how the model was trained; "
            "export from an instruct model, or save a chat_template.jinja beside the tokenizer."
        )
    made = from_tokenizer(tokenizer)
    longest = _json(merged / "config.json").get("max_position_embeddings")
    made.parameters = {"num_ctx": context or min(longest or 4096, LONGEST_CONTEXT), **_sampling(merged)}
    made.stops = stops(tokenizer, merged)
    if not made.reason:
        made.path = write_atomic(out, _text(made, gguf, out, system))
    made.commands = _commands(merged, gguf, name, made)
    return made


def from_tokenizer(tokenizer: Any) -> Modelfile:
    """The Go template of a tokenizer and its comparison, without a file; `reason` where it cannot be said in Go."""
    render = go_template.jinja_renderer(tokenizer)
    try:
        turns = go_template.derive(render, tokenizer.bos_token or "")
    except go_template.Inexpressible as error:
        return Modelfile(NO_GO.format(error))
    checks = go_template.compare(render, turns)
    different = [c for c in checks if not c.equal and c.jinja is not None]
    why = {
        "blanks at the edges": " (the Jinja trims every message, Go cannot)",
        "two questions running": " (Ollama joins them before the template sees them)",
    }
    notes = [f"The prompt differs from the training one for: {c.shape}{why.get(c.shape, '')}." for c in different]
    if turns.system_place == "none":
        notes.append("The model's template takes no system prompt; a SYSTEM line or system message is not printed.")
    if go_template.takes_tools(render):
        notes.append("Go writes tools differently: recent Ollama renders them with the GGUF's own Jinja instead.")
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append("The model's template prints today's date; this one prints the date on which it was written.")
    broken = ", ".join(c.shape for c in different if c.needed)
    return Modelfile(NO_GO.format(f"the prompts differ for {broken}") if broken else "", turns.go(), checks, notes)


def stops(tokenizer: Any, merged: Path) -> list[str]:
    """Texts at which every runtime shall stop: the ends of a turn, of the sequence, of generation_config."""
    ids = stop_tokens(tokenizer, _json(merged / "generation_config.json").get("eos_token_id"))
    return [tokenizer.convert_ids_to_tokens(i) for i in ids if i < len(tokenizer)]


def check_name(name: str) -> None:
    """Raises TunebookError for a model name that a shell, a path or Ollama would trip over."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", name):
        raise TunebookError(
            f"model_name is {name!r}, which is not a valid name for Ollama and its like; use at most 80 small letters, "
            "digits, '.', '_' and '-'."
        )


def _commands(merged: Path, gguf: Path, name: str, made: Modelfile) -> dict[str, str]:
    """Exact commands for this very model: runtime -> shell lines. All of them listen on this machine alone."""
    sampling = {k.replace("repeat_", "repetition_"): v for k, v in made.parameters.items() if k != "num_ctx"}
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "stop": made.stops, **sampling}
    values = {"merged": merged, "gguf": gguf, "name": name, "sampling": sampling, "body": body}
    values |= {"modelfile": made.path, "context": made.parameters["num_ctx"]}
    template = merged / "chat_template.jinja"
    text = _rendered("runtimes.j2", **values, template=template if template.is_file() else None)
    parts = [part.partition("\n") for part in re.split("(?m)^== ", text)[1:]]
    return {runtime: commands.rstrip() for runtime, _, commands in parts}


def _text(made: Modelfile, gguf: Path, out: Path, system: str) -> str:
    path = Path(os.path.relpath(gguf.resolve(), out.resolve().parent)).as_posix()
    if not path.isprintable() or '"' in path:
        raise TunebookError(f"A Modelfile cannot hold the file name {path!r}; rename it without quotes and line ends.")
    if '"""' in made.template + "\n" + system:
        raise TunebookError(
            "The template or system prompt holds three double quotes in a row, which a Modelfile cannot carry; "
            "take them out of the system prompt."
        )
    path = path if path.startswith("../") else f"./{path}"
    return _rendered("modelfile.j2", **vars(made) | {"gguf": path, "system": system})


def _rendered(file: str, **values: Any) -> str:
    """Shell lines or a Modelfile from a template of this folder; nothing in it is HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    made = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, **options)
    made.filters |= {"q": lambda value: shlex.quote(str(value)), "json": partial(json.dumps, ensure_ascii=False)}
    return made.get_template(file).render(**values)


def _sampling(merged: Path) -> dict[str, float]:
    config = _json(merged / "generation_config.json")
    drawn = SAMPLING if config.get("do_sample") is not False else ("repetition_penalty",)
    values = {k: config[k] for k in drawn if isinstance(config.get(k), (int, float))}
    return {k.replace("repetition_", "repeat_"): v for k, v in ({"temperature": 0} | values).items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise TunebookError(f"{path} is not valid JSON ({error}); export the model again.") from error
