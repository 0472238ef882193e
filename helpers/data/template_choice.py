"""The chat template that a parameter chooses, by name, file or text, and how its turn tokens come into the vocabulary.

What marks its turns is read off its rendering. A marker that is a token already is used; the others become tokens
("add"), or stay plain text while the answer ends with the model's own end of sequence ("eos").
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.data import vocabulary
from helpers.data.chat_template import PROBE_SECONDS, adds_bos, render
from helpers.data.turns import RowError
from helpers.errors import TunebookError
from helpers.model.loading import mend_padding
from helpers.model.stop_tokens import ANSWER, QUESTION, special_pattern

NAMED = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
MARKER = r"<\|[^<>|\s]{1,40}\|>|</?[A-Za-z_]\w{0,30}>|\[/?[A-Z_]{2,30}\]"
ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}.*?\{%-?\s*endgeneration\s*-?%\}", re.DOTALL)
OWN_END = "<|endoftext|>"  # added where the tokenizer has no end of sequence and the template wants one
# Between instruction and input, context and question, where a template's family writes something of its own.
JOINTS = {"alpaca": {"input": "\n\n### Input:\n"}, "context_qa": {"context": "\n===\n"}}
USED = {
    "vocabulary": "{} in the vocabulary already",
    "add": "{} used; added, started as the mean of their pieces and trained: {added}",
    "eos": "{} written as plain text; an answer ends with the model's own {eos}",
}


def read(value: str) -> tuple[str, str]:
    """(name, Jinja text) of what `chat_template` says: a name of `NAMED`, a file, or the text itself."""
    value = value.strip()
    if value.lower() in NAMED:
        return value.lower(), NAMED[value.lower()].read_text(encoding="utf-8")
    if "{{" in value or "{%" in value:
        return "given as text", value
    places = [root / machine.path(value) for root in machine.places()] if len(value) < 1000 else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        near = difflib.get_close_matches(value.lower(), NAMED, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(NAMED)}."
        raise TunebookError(
            f"chat_template is {value[:200]!r}, which is neither a known name, nor a file, nor Jinja text; {hint}"
        )
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TunebookError(f"chat_template {path} cannot be read as UTF-8 text ({error}).") from None


def joints(chat_template: str) -> dict[str, str]:
    """What stands between the parts of a question in this template's family (`formats.convert`)."""
    return JOINTS.get(chat_template.strip().lower(), {})


def choose(tokenizer: Any, chat_template: str, template_tokens: str = "auto") -> dict[str, Any]:
    """Give `tokenizer` the template that the parameters say, its turn tokens, end of sequence and padding.

    {name, tokens: "vocabulary", "add" or "eos", markers: of turns (of "eos" the ones that stay text), added, eos, pad,
    replaced: it had a template of its own}; {} where the tokenizer's own is kept. Raises TunebookError with a Jinja
    error's line, and for a template without a question, an answer or an end of turn.
    """
    if not chat_template.strip():
        return {}
    name, text = read(chat_template)
    said, own_end, replaced = f"The chat template {name}", tokenizer.eos_token, bool(tokenizer.chat_template)
    tokenizer.chat_template = text
    if not own_end:
        tokenizer.eos_token = OWN_END  # so that a template which wants one can be rendered
    shown, markers, end = _read_off(tokenizer, said)
    missing = [marker for marker in markers if tokenizer.tokenize(marker) != [marker]]
    used = "eos" if template_tokens == "eos" or (missing and template_tokens == "auto") else "vocabulary"
    if missing and template_tokens == "add":
        used = "add"
        vocabulary.add_tokens(None, tokenizer, missing, special=True)
    if used == "eos" and not own_end:
        raise TunebookError(
            f"{said} needs an end of sequence behind an answer and the tokenizer has none; set template_tokens to add."
        )
    if used != "eos":
        tokenizer.add_special_tokens({"eos_token": end})
    elif end != own_end:
        inside = ANSWERS.sub(lambda block: block.group().replace(end, own_end), text)
        text = inside if inside != text else text.replace(end, own_end)
    begins = adds_bos(tokenizer) and not shown.startswith(tokenizer.bos_token)
    tokenizer.chat_template = "{{- bos_token }}" * begins + text
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        mend_padding(tokenizer)
    added, markers = missing if used == "add" else [], missing if used == "eos" else markers
    found: dict[str, Any] = {"name": name, "tokens": used, "markers": markers, "added": added, "replaced": replaced}
    return {**found, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}


def facts(choice: dict[str, Any]) -> list[tuple[str, str]]:
    """What was chosen, as (what, how it is)."""
    if not choice:
        return []
    own = "; the model was trained with another one, which it replaces" if choice["replaced"] else ""
    values = {"added": ", ".join(choice["added"]), "eos": choice["eos"]}
    used = USED[choice["tokens"]].format(", ".join(choice["markers"]) or "none,", **values)
    end = f"end of sequence {choice['eos']}, padding {choice['pad']}"
    return [("chat template", f"{choice['name']}, as chat_template says{own}"), ("turn tokens", f"{used}; {end}")]


def _read_off(tokenizer: Any, said: str) -> tuple[str, list[str], str]:
    """(a rendered question and answer, what marks the turns, what ends an answer)."""
    system = {"role": "system", "content": "SSS"}
    renderings = render(tokenizer, [([QUESTION, ANSWER], None, []), ([system, QUESTION], None, [])], PROBE_SECONDS)
    if isinstance(renderings[0], RowError):
        raise TunebookError(f"{said} cannot render a question and an answer ({renderings[0].detail}); mend it.")
    texts = [one.full for one in renderings if not isinstance(one, RowError)]
    for content, what in (("QQQ", "the question"), ("AAA", "the answer")):
        if content not in texts[0]:
            raise TunebookError(f"{said} leaves out {what}; print the content of every message in it.")
    pattern = re.compile(f"{special_pattern(tokenizer).pattern}|{MARKER}")
    behind = texts[0][texts[0].rindex("AAA") + 3 :]
    if (end := pattern.search(behind)) is None:
        raise TunebookError(
            f"{said} has no end of turn behind the answer (it writes {behind!r}), so a model trained with it could not "
            "learn to stop; write {{ eos_token }} there."
        )
    begin = tokenizer.bos_token if adds_bos(tokenizer) else None
    markers = dict.fromkeys(found for text in texts for found in pattern.findall(text) if found != begin)
    return texts[0], list(markers), end.group()
