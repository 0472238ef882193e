"""What other runtimes need to run the exported model as it was trained: an Ollama Modelfile, and exact commands.

`write` makes an explicit Modelfile (template in Go, stops, context, sampling), because Ollama's own guess replaces the model's
template by a stock one. The template is derived and compared in `helpers.gguf.go_template`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError
from helpers.gguf import go_template
from helpers.runs import write_atomic

LONGEST_CONTEXT = (
    8192  # tokens; a context costs memory in every runtime, so a model's millions are not asked for by default
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Modelfile:
    """An Ollama Modelfile and how far its template is the model's own.

    path: None when the Jinja template cannot be said in Go (`reason` tells why); then nothing was written. checks: the
    conversation shapes compared. notes: sentences on what differs in shapes this job may not use.
    """

    path: Path | None
    text: str
    template: str
    stops: list[str]
    parameters: dict[str, Any]
    checks: list[go_template.Check]
    notes: list[str]
    reason: str = ""
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

    def _repr_html_(self) -> str:
        from helpers.display import table

        rows = [
            (
                c.shape,
                "same prompt" if c.equal else "refused by the model's own template" if c.jinja is None else "differs",
            )
            for c in self.checks
        ]
        head = f"<p>{_escape(self.reason)}</p>" if self.reason else ""
        notes = "".join(f"<li>{_escape(n)}</li>" for n in self.notes)
        commands = "".join(f"<h4>{_escape(k)}</h4><pre>{_escape(v)}</pre>" for k, v in self.commands.items())
        return f"{head}{table(rows, ('conversation', 'Go template against Jinja'))}<ul>{notes}</ul>{commands}"


def write(
    merged_dir: str | Path,
    gguf_path: str | Path,
    out_path: str | Path,
    *,
    name: str = "tunebook",
    context: int = 0,
    sampling: dict[str, float] | None = None,
    system: str = "",
) -> Modelfile:
    """Write the Modelfile for `gguf_path` to `out_path` and compare its template with the model's own on every shape.

    merged_dir: the 16-bit model folder with tokenizer and chat template. name: what the model shall be called there.
    context: tokens; 0 takes the model's, at most 8192. sampling: over generation_config.json (temperature 0 where neither
    speaks: what was measured is greedy). system: a SYSTEM line, "" leaves the template's own default.

    Raises TunebookError for a missing template, an unusable path or a name that a shell or Ollama would trip over.
    """
    from helpers.model.loading import load_tokenizer

    merged, gguf, out = Path(merged_dir), Path(gguf_path), Path(out_path)
    check_name(name)
    if not gguf.is_file():
        raise TunebookError(f"There is no GGUF file at {gguf}; run 04_gguf_export first.")
    tokenizer = load_tokenizer(merged)
    if not tokenizer.chat_template:
        raise TunebookError(
            f"The tokenizer in {merged} has no chat template, so no runtime can know how the model was trained; "
            "export from an instruct model, or save a chat_template.jinja beside the tokenizer."
        )
    parameters = {"num_ctx": context or _context(merged), **_sampling(merged, sampling)}
    made = from_tokenizer(tokenizer, stops=stops(tokenizer, merged))
    commands = runtime_commands(
        merged, gguf, name=name, parameters=parameters, stop=made.stops, modelfile=out if not made.reason else None
    )
    text = "" if made.reason else _text(made, _relative(gguf, out), parameters, system)
    path = write_atomic(out, text) if text else None
    return Modelfile(path, text, made.template, made.stops, parameters, made.checks, made.notes, made.reason, commands)


def from_tokenizer(tokenizer: Any, stops: list[str] | None = None) -> Modelfile:
    """The Go template of a tokenizer and its comparison, without a file. `reason` is set where it cannot be said in Go."""
    render = go_template.jinja_renderer(tokenizer)
    try:
        turns = go_template.derive(render, tokenizer.bos_token or "")
    except go_template.Inexpressible as error:
        return Modelfile(
            None,
            "",
            "",
            stops or [],
            {},
            [],
            [],
            f"The chat template cannot be said in Ollama's Go template: {error}. "
            "Serve the GGUF with llama.cpp or the merged model with vLLM, which run the Jinja itself.",
        )
    checks = go_template.compare(render, turns.render)
    broken = [c.shape for c in checks if c.needed and not c.equal and c.jinja is not None]
    reason = ""
    if broken:
        reason = (
            f"The chat template cannot be said in Ollama's Go template: the prompts differ for {', '.join(broken)}. "
            "Serve the GGUF with llama.cpp or the merged model with vLLM, which run the Jinja itself."
        )
    return Modelfile(None, "", turns.go(), stops or [], {}, checks, _notes(tokenizer, render, turns, checks), reason)


def stops(tokenizer: Any, merged: Path | None = None) -> list[str]:
    """Texts at which every runtime shall stop: the end of an assistant turn, the end of sequence, generation_config's ends."""
    from helpers.model.loading import end_of_turn

    ids = [end_of_turn(tokenizer), tokenizer.eos_token_id]
    if merged is not None:
        ends = _json(merged / "generation_config.json").get("eos_token_id") or []
        ids += ends if isinstance(ends, list) else [ends]
    texts = [tokenizer.convert_ids_to_tokens(i) for i in ids if isinstance(i, int) and 0 <= i < len(tokenizer)]
    return list(dict.fromkeys(t for t in texts if t))


def runtime_commands(
    merged: Path, gguf: Path, *, name: str, parameters: dict[str, Any], stop: list[str], modelfile: Path | None
) -> dict[str, str]:
    """Exact commands for this very model: runtime -> shell lines. All of them listen on this machine alone."""
    check_name(name)
    q, n_ctx = shlex.quote, parameters["num_ctx"]
    sampling = {k: v for k, v in parameters.items() if k != "num_ctx"}
    override = {("repetition_penalty" if k == "repeat_penalty" else k): v for k, v in sampling.items()}
    template = merged / "chat_template.jinja"
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "stop": stop, **override}
    found = {}
    if modelfile is not None:
        found["Ollama"] = f"ollama create {q(name)} -f {q(str(modelfile))}\nollama run {q(name)}"
    found["vLLM"] = (
        f"vllm serve {q(str(merged))} --served-model-name {q(name)} --host 127.0.0.1 --max-model-len {n_ctx}"
        + (f" --chat-template {q(str(template))}" if template.is_file() else "")
        + f" --override-generation-config {q(json.dumps(override))}\n"
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {q(json.dumps(body, ensure_ascii=False))}"
    )
    found["LM Studio"] = (
        f"lms import --copy --user-repo tunebook/{q(name)} {q(str(gguf))}\n"
        f"lms load {q(name)} --context-length {n_ctx}\nlms server start --port 1234\n"
        f"# prompt template: the GGUF's own Jinja (My Models > Prompt Template > Default); stop strings: {' '.join(stop)}"
    )
    found["llama.cpp"] = f"python -m helpers.serve {q(str(gguf))} --port 8080 --context {n_ctx}"
    found["Open WebUI"] = (
        found["llama.cpp"] + "\nWEBUI_AUTH=False ENABLE_OLLAMA_API=False OPENAI_API_BASE_URL=http://127.0.0.1:8080/v1 "
        "OPENAI_API_KEY=none open-webui serve --host 127.0.0.1 --port 3000"
    )
    return found


def _text(made: Modelfile, gguf: str, parameters: dict[str, Any], system: str) -> str:
    if '"""' in made.template or '"""' in system:
        raise TunebookError(
            "The template or system prompt holds three double quotes in a row, which a Modelfile cannot carry; "
            "take them out of the system prompt."
        )
    lines = [
        "# Template, stops and context are explicit: Ollama's own guess would change the prompt the model was trained with."
    ]
    lines += [f"# Note: {n}" for n in made.notes]
    lines += [f"FROM {gguf}", f'TEMPLATE """{made.template}"""']
    lines += [f"PARAMETER stop {json.dumps(s, ensure_ascii=False) if chr(34) not in s else s}" for s in made.stops]
    lines += [f"PARAMETER {k} {v}" for k, v in parameters.items()]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def _notes(tokenizer: Any, render: Any, turns: go_template.Turns, checks: list[go_template.Check]) -> list[str]:
    notes = []
    for check in checks:
        if check.equal or check.jinja is None:
            continue
        why = (
            " (the Jinja trims every message, Go cannot)"
            if check.shape == "blanks at the edges"
            else " (Ollama joins them before the template sees them)"
            if check.shape == "two questions running"
            else ""
        )
        notes.append(f"The prompt differs from the training one for: {check.shape}{why}.")
    if turns.system_place == "none":
        notes.append("The model's template takes no system prompt; a SYSTEM line or system message is not printed.")
    if go_template.takes_tools(render):
        notes.append(
            "Tools are not in this template: Go writes their JSON differently. Recent Ollama renders tool calls with the GGUF's own Jinja."
        )
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append("The model's template prints today's date; this one prints the date on which it was written.")
    return notes


def _sampling(merged: Path, given: dict[str, float] | None) -> dict[str, float]:
    config = _json(merged / "generation_config.json")
    values = {
        k: config[k]
        for k in SAMPLING
        if isinstance(config.get(k), (int, float)) and not isinstance(config.get(k), bool)
    }
    if config.get("do_sample") is False:
        values = {k: v for k, v in values.items() if k == "repetition_penalty"}
    values.update(given or {})
    values.setdefault("temperature", 0)
    return {("repeat_penalty" if k == "repetition_penalty" else k): v for k, v in values.items()}


def _context(merged: Path) -> int:
    longest = _json(merged / "config.json").get("max_position_embeddings")
    return min(int(longest), LONGEST_CONTEXT) if isinstance(longest, int) and longest > 0 else 4096


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TunebookError(f"{path} is not valid JSON ({error}); export the model again.") from error
    return value if isinstance(value, dict) else {}


def _relative(gguf: Path, out: Path) -> str:
    """The GGUF's path as a Modelfile names it: relative to the Modelfile. Raises TunebookError where the format cannot hold it."""
    path = Path(os.path.relpath(gguf.resolve(), out.resolve().parent)).as_posix()
    path = path if path.startswith("../") else f"./{path}"
    if not path.isprintable() or '"' in path:
        raise TunebookError(
            f"The file name {path!r} cannot stand in a Modelfile; rename it without quotes and line breaks."
        )
    return path


def check_name(name: str) -> None:
    """Raises TunebookError for a model name that a shell, a path or Ollama would trip over."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", name):
        raise TunebookError(
            f"{name!r} is no model name for Ollama and its like; use small letters, digits, '.', '_' and '-', at most 80."
        )


def _escape(text: str) -> str:
    import html

    return html.escape(text)
