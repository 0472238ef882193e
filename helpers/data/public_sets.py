"""Forms of public sets that need more than names of columns, and what of a row must not be lost in silence.

Sets told by their columns; answer choices; conversations written as one text or as bare lists; trees of messages
(OASST); columns that can be read in two ways.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from helpers.data.turns import RowError, Turn, as_text, from_json, kind_of

Record = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERED = re.compile(r"(?:op|opt|option|choice|sol|answer|ending)?_?([a-h]|[0-9])")  # opa, option_a, choice1, sol2, A
KEYS = "answer_idx answer_index answerkey answer_key correct_option correct cop gold label answer correct_answer target"
BEFORE = re.compile(r"\s*\(?([A-H])[).:]\s*")  # what stands before a choice that brings its letter
ROLES = {"Human": "user", "User": "user", "Instruction": "user", "Assistant": "assistant", "Response": "assistant"}
HASHED = re.compile(r"### ?(Human|User|Instruction|Input|Assistant|Response|System):")
SPOKEN = re.compile(r"(?:\A|\n\n)(Human|Assistant|System):")
LISTED = re.compile(r"""\s*\[\s*[\[{"']""")  # a list as JSON or Python writes it
TELLING = frozenset(" \n\t[{#HB")  # how a text begins that may be more than a text
LABELS = dict.fromkeys(("true", "yes", "1", "1.0", "desirable"), True)
LABELS |= dict.fromkeys(("false", "no", "0", "0.0", "undesirable"), False)
MISSING = (None, "", "nan", "NaN", "<NA>")  # a value as pandas writes it
NOTHING = (*MISSING, "None", "null", "NULL")  # of a column that a row need not have
CALLS = re.compile(r'\s*(?:\[\s*)?\{\s*"name"\s*:')  # function calls, as JSON writes them
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")  # as JSON or Python writes them
TEMPLATED = re.compile(r"<\|im_start\|>|\[INST\]|<\|user\|>|<start_of_turn>|<\|start_header_id\|>")
MESSAGE = {"message_id", "parent_id", "text", "role"}  # of one message of a tree


# Columns that tell a set → how they are meant.
MAPPED = {
    "db_id question query": "prompt=question,response=query",  # Spider
    "sql_prompt sql_context sql": "prompt=sql_prompt,context=sql_context,response=sql",
    "definition inputs targets": "prompt=definition,query=inputs,response=targets",  # natural instructions
    "question best_answer incorrect_answers": "prompt=question,response=best_answer",  # TruthfulQA
    "question correct_answer distractor1 support": "prompt=question,context=support,response=correct_answer",  # SciQ
    "premise question choice1 choice2 label": "context=premise,prompt=question,choices=choice1+choice2,response=label",
    "text code test_list": "prompt=text,response=code",  # MBPP
    "prompt canonical_solution": "prompt=prompt,response=canonical_solution",  # HumanEval
}
# Columns that tell a set of compared answers → (question, one answer, another, how much better the first is).
COMPARED: dict[str, Callable[..., tuple]] = {
    "history human_ref_a human_ref_b labels": lambda q, a, b, first: (q, a, b, first or -1),  # SHP
    "prompt response_0 response_1 better_response_id": lambda q, a, b, best: (q, b, a, best or -1),  # PKU-SafeRLHF
    "instruction output_1 output_2 preference": lambda q, a, b, best: (q, b, a, best - 1.5),  # AlpacaFarm
    "question response_j response_k": lambda q, a, b: (q, a, b, 1),  # Stack Exchange
    "question answer_0 answer_1 score_0 score_1": lambda q, a, b, x, y: (q.get("full_text"), a, b, x - y),  # WebGPT
    "info summaries choice": lambda q, both, best: (q.get("post"), both[1]["text"], both[0]["text"], best or -1),
    "conversation_a conversation_b winner": lambda a, b, won: (None, a, b, (won == "model_a") - (won == "model_b")),
    "instruction completions": lambda q, found: (q, *_ends(found, "response", "overall_score", 1)),  # UltraFeedback
    "prompt answers num_responses": lambda q, found, _: (q, *_ends(found, "answer", "rank", -1)),  # Nectar
}


def _ends(found: list[dict], text: str, score: str, sign: int) -> tuple:
    worst, *_, best = sorted(found, key=lambda one: sign * one[score])
    return best[text], worst[text], sign * (best[score] - worst[score])


def compared(record: Record, told: str) -> dict[str, Any]:
    """Prompt, chosen and rejected of a record of the set of COMPARED that the columns `told` tell. Raises RowError."""
    columns = {name_of(column): value for column, value in record.items()}
    try:
        prompt, one, other, better = COMPARED[told](*(columns[name] for name in told.split()))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise RowError("wrong type", f"the answers of {told} cannot be compared ({type(error).__name__})") from None
    if not better:
        raise RowError("no better answer", f"{told}: the answers are equally good")
    return {"prompt": prompt, "chosen": one if better > 0 else other, "rejected": other if better > 0 else one}


def name_of(column: Any) -> str:
    """A column's name as names are compared: lower case, with underscores."""
    return re.sub(r"[\s-]+", "_", str(column).strip().casefold())


def names_in(record: Record) -> dict[str, str]:
    """Name as names are compared → column; of two that are alike the first counts."""
    names: dict[str, str] = {}
    for column in record:
        names.setdefault(name_of(column), column)
    return names


def told_by(record: Record, names: Mapping[str, str], sets: Iterable[str]) -> str:
    """The first of the sets whose columns a record has. names: name → column."""
    held = {name for name, column in names.items() if record[column] is not None}
    return next((told for told in sets if held >= set(told.split())), "")


def mapped(record: Record, names: Mapping[str, str]) -> str:
    """How the columns of a set of MAPPED are meant, as the parameter `columns` says it; "" for any other record."""
    meant = MAPPED.get(told_by(record, names, MAPPED), "")
    return re.sub(r"(?<=[=+])\w+", lambda name: names[name[0]], meant)


# ---------------------------------------------------------------- choices


def choices_in(record: Record, names: Mapping[str, str]) -> tuple[str, str]:
    """The column of a record's answer choices, or "option_a+option_b+…", and that of the right one; "" for none."""
    lettered = {name: column for name, column in names.items() if LETTERED.fullmatch(name)}
    listed = (names.get(name, "") for name in ("choices", "options", "endings"))
    where = next((column for column in listed if column and is_list(record[column])), "")
    where = where or "+".join(lettered.values()) * (len(lettered) > 1)
    keys = (names[key] for key in KEYS.split() if key in names and key not in lettered)
    key = next((column for column in keys if isinstance(record[column], (str, int, float))), "")
    return (where, key) if where and key else ("", "")


def choices_of(record: Record, where: str) -> list[tuple[str, str]]:
    """(letter, text) of every answer choice, whichever way they are written. Raises RowError."""
    value = written(record[where], where) if isinstance(record.get(where), str) else record.get(where)
    if where not in record:
        marks = ((LETTERED.fullmatch(name_of(column)), column) for column in where.split("+"))
        value = {mark[1].upper() if mark else column: record.get(column) for mark, column in marks}
    if isinstance(value, Mapping) and isinstance(texts := value.get("text"), (list, tuple)):
        found = list(zip(value.get("label") or LETTERS, texts, strict=False))
    elif isinstance(value, Mapping):
        found = list(value.items())
    elif isinstance(value, (list, tuple)):
        objects = all(isinstance(one, Mapping) for one in value)
        pairs = [(one.get("key") or one.get("label"), one.get("value") or one.get("text")) for one in value if objects]
        found = pairs or list(zip(LETTERS, value, strict=False))
    else:
        raise RowError("broken choices", f"{where!r} holds {kind_of(value)}; a list of answers was expected")
    told = [(str(label), as_text(text, where).strip()) for label, text in found if text is not None]
    if len(told) < 2:
        raise RowError("broken choices", f"{where!r} holds {len(told)} answers; two or more were expected")
    before = [BEFORE.match(text) for _, text in told]
    return [(mark[1], mark.string[mark.end() :]) for mark in before if mark] if all(before) else told


def picked(answer: Any, choices: list[tuple[str, str]], apart: bool = False) -> str:
    """The right choice as "B. its text". answer: its letter, text or index from 0; where the choices stand in columns
    of their own (`apart`), a text of digits may count from 1 and is refused. Raises RowError.
    """
    said = str(answer).strip().casefold()
    letter = re.sub(r"^(?:option|choice|answer|ending|sol)?[\s_(]*(\w)\W*$", r"\1", said)
    by_index = [label for at, (label, _) in enumerate(choices) if str(at) == said.removesuffix(".0")]
    told = [label for label, _ in choices if label.casefold() == letter]
    told += [label for label, text in choices if text.casefold() == said]
    labels = told + by_index * (not apart) if isinstance(answer, str) else by_index
    if not labels:
        known = ", ".join(label for label, _ in choices)
        found = f"the right choice is {str(answer)[:60]!r}: none of {known}, none of their texts, no index from 0"
        raise RowError("no answer", found)
    return next(f"{label}. {text}" for label, text in choices if label == labels[0])


# ---------------------------------------------------------------- conversations


def is_list(value: Any) -> bool:
    """Whether a value is a list or an object, or the text of one."""
    return isinstance(value, (list, tuple, Mapping)) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))


def form(value: Any) -> Any:
    """What a value's use depends on: its type, what a list begins with, whether a text may be more than a text."""
    if type(value) is str:
        return str if value[:1] not in TELLING else (is_talk(value), is_marked(value), is_list(value))
    return (list, type(value[0]) if value else None) if isinstance(value, (list, tuple)) else type(value)


def is_answer(value: Any) -> bool:
    """Whether a value is a text, a list, a message or SQuAD's object of texts; not another object: a parsed query."""
    return value is not None and (not isinstance(value, Mapping) or bool(value.keys() & {"text", "content", "value"}))


def is_marked(text: Any) -> bool:
    """Whether a text is a conversation with marks: "### Human: …### Assistant: …", "Human: …\\n\\nAssistant: …"."""
    begin = text[:100].lstrip() if isinstance(text, str) and text[:1] in TELLING else ""
    if begin.startswith("Human:"):
        return "\n\nAssistant:" in text
    hashed = HASHED.match(begin) or begin.startswith("Below is an instruction")
    return bool(hashed) and any(mark[1] in ("Assistant", "Response") for mark in HASHED.finditer(text))


def is_talk(value: Any) -> bool:
    """Whether a value may be a conversation: a list, the text of one as CSV and parquet hold it, or a marked text."""
    return isinstance(value, (list, tuple)) or (
        isinstance(value, str) and (is_marked(value) or bool(LISTED.match(value)))
    )


def written(text: str, what: str) -> Any:
    """The value of a text that JSON or Python wrote. Raises RowError."""
    for spelt in (text, re.sub(r"\}\s*\n\s*\{", "}, {", text)):  # numpy writes no comma between objects
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(spelt) if "'" in text[:20] else from_json(text, "wrong type", what)
    return from_json(text, "wrong type", what)


def talk(value: Any) -> Any:
    """A conversation of any public form as the list of messages that `messages.read_turns` takes.

    Marked text; JSON or Python text; strings that take turns (LIMA); pairs of input and output (Capybara). What is none
    of these is given back as it is.
    """
    if isinstance(value, str):
        value = _marked(value) if is_marked(value) else written(value, "the conversation")
    if not isinstance(value, (list, tuple)) or not value:
        return value
    if all(isinstance(one, str) for one in value):
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(value)]
    if all(isinstance(one, Mapping) and one.keys() >= {"input", "output"} for one in value):
        said = (("user", "input"), ("assistant", "output"))
        return [{"role": role, "content": one[key]} for one in value for role, key in said]
    return value


def _marked(text: str) -> list[dict]:
    before, *pieces = (SPOKEN if text.lstrip().startswith("Human:") else HASHED).split(text)
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for role, said in zip(pieces[::2], pieces[1::2], strict=True):
        if role == "Input" and turns:
            turns[-1]["content"] += "\n" + said.strip()
        else:
            turns.append({"role": ROLES.get(role, "system"), "content": said.strip()})
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def stitched(records: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
    """The records; where each is one message of a tree (OASST), the conversations that lead to a last answer instead.

    Every answer is in one of them. Holds the messages in memory. Format: https://huggingface.co/datasets/OpenAssistant/oasst1
    """
    head = list(itertools.islice(records, 1))
    if not head or not head[0][1].keys() >= MESSAGE:
        yield from itertools.chain(head, records)
        return
    told = {str(one.get("message_id")): (number, one) for number, one in itertools.chain(head, records)}
    above = {key: str(one.get("parent_id") or "") for key, (_, one) in told.items()}
    answers = [key for key, (_, one) in told.items() if one.get("role") == "assistant"]
    answered = {above.get(above[key]) for key in answers}
    for key in (key for key in answers if key not in answered):
        path = [key]
        while above[path[-1]] in told and above[path[-1]] not in path:
            path.append(above[path[-1]])
        said = [told[one][1] for one in reversed(path)]
        turns = [{"role": str(one.get("role")).replace("prompter", "user"), "content": one.get("text")} for one in said]
        if above[path[-1]]:
            turns.insert(0, {"role": "message that is not in this file", "content": ""})
        yield told[key][0], {"messages": turns} | {name: said[-1].get(name) for name in ("lang", "rank")}


# ---------------------------------------------------------------- what plays no part


def is_told(value: Any, part: str, rows: list[dict[str, Any]]) -> bool:
    """Whether nothing is lost with a value that plays no part: its text stands in the row, or the row's in it."""
    kind, spelt = rows[0]["kind"], str(value).strip().casefold()
    if part == "template":
        return not TEMPLATED.search(str(value)[:300])
    if part == "label":
        return kind == "preference" or (kind != "text" and spelt not in LABELS)
    said = [
        turn["content"] for row in rows for side in ("messages", "chosen", "rejected") for turn in row.get(side, ())
    ]
    texts, whole = [text.strip() for text in _texts(value)], "\n".join(said)
    if part == "response" and said[-1].strip() in texts:
        return True
    words = all(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", whole) for text in texts)
    return words or all(text.strip() in "\n".join(texts) for text in said)


def _texts(value: Any) -> list[str]:
    """Every text and number within a value, roles left out."""
    if isinstance(value, Mapping):
        value = [item for key, item in value.items() if key not in ("role", "from", "type")]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return [] if value is None else [str(value)]


def setting(record: Record, columns: Mapping[str, str], **changed: str) -> str:
    """The `columns` that read a record as its shape's `columns` do, with some parts changed."""
    parts = {part: column for part, column in columns.items() if part not in ("system", "tools")} | changed
    there = (f"{part}={one}" for part, one in parts.items() if one and (one in record or "+" in one))
    return "columns=" + ",".join(there)


def readings(record: Record, format: str, columns: Mapping[str, str], aside: Mapping[str, str], part: str) -> str:
    """The two readings of a record whose shape puts columns aside, with the setting of each. aside: part → column."""
    changed = functools.partial(setting, record, columns)
    without, talks, column = changed(), columns.get("messages"), aside[part]
    alone = dict.fromkeys(("response", "chosen", "rejected", "label", "messages"), "")
    if part == "template":
        return (
            f"column {column!r} holds conversations that a chat template rendered; format=text trains them as they are"
        )
    if format == "text":
        parts = (column, columns["prompt"]) if part == "prompt" else (columns["prompt"], column)
        use, without = "columns=prompt={},response={}".format(*parts), "format=text"
    elif part == "label":
        use = "format=kto"
    elif part in ("response", "summary", "chosen") or (talks and part == "prompt" and "response" in aside):
        prompt = aside.get("prompt", talks) if talks else columns["prompt"]
        use = changed(**alone | {"prompt": prompt, "response": aside.get("response", column)})
    elif part == "rejected":
        use = changed(**alone | {"chosen": columns.get("response", ""), "rejected": column})
    elif part == "messages":
        use = changed(**{one: "" for one in columns if format != "preference"} | {"messages": column})
    else:
        part = "system" if talks else {"prompt": "query", "text": "context"}.get(part, part)
        before = f"{columns[part]}+" if columns.get(part) and part in ("query", "context") else ""
        use = changed(**{part: before + column})
    return f"column {column!r} would be put aside. To use it: {use}. To leave it out: {without}"


def without_prompt(prompt: list[Turn], sides: list[list[Turn]]) -> list[list[Turn]]:
    """The two answers without the question, where both are texts that begin with it."""
    question = prompt[-1]["content"].strip() if prompt and prompt[-1]["role"] == "user" else ""
    texts = [side[0]["content"].lstrip() for side in sides if len(side) == 1]
    rests = [text[len(question) :] for text in texts if question and text.startswith(question)]
    ends = "\n" if len(question) < 12 else "\n\t "  # an answer to "Hi" may well begin with "Hi"
    if len(rests) < 2 or not all(rest[:1] and rest[0] in ends for rest in rests):
        return sides
    return [[{**side[0], "content": rest.lstrip()}] for side, rest in zip(sides, rests, strict=True)]
