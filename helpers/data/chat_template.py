"""A tokenizer's chat template: what it does to a conversation, found out by rendering, and renderings under guard.

Nothing here knows any template by name. Whether it has a default system prompt, writes `<think>`, shows tools, tool calls
or tool results, and how it ends a turn, is read off small probes. Templates come from strangers: transformers runs them in
a sandbox (no attributes, no writes); here they also get a time limit, a memory limit and a limit on what they write.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from helpers.data.turns import RowError
from helpers.errors import TunebookError

PROBE_SECONDS = 10
BATCH_SECONDS = 120  # for a batch of 1,000 rows, which takes 0.03 s
HEADROOM = 4 * 2**30  # bytes that a rendering may add to the process
MAX_GROWTH = 20  # a rendering may be this many times its messages, and MAX_ADDED characters on top
MAX_ADDED = 200_000


@dataclass(frozen=True)
class Template:
    """What a tokenizer's chat template does, as its own renderings show.

    end_ids: tokens that end an assistant turn, the plain one first. before_answer: text between the generation prompt and
    the answer. default_system: text that the template adds when a conversation has no system message.
    """

    tokenizer: Any
    end_ids: tuple[int, ...]
    generation_prompt: str
    before_answer: str
    default_system: str
    shows_tools: bool
    shows_tool_calls: bool
    shows_tool_results: bool
    takes_system: bool
    keeps_thinking: bool
    has_markers: bool
    adds_bos: bool
    special_ids: frozenset[int]
    special_text: re.Pattern

    @property
    def end_text(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.end_ids[0])

    def facts(self) -> list[tuple[str, str]]:
        """What a person should know about this template, as (what, how it is)."""
        yes = {True: "yes", False: "no"}
        return [
            ("end of turn", " or ".join(f"{self.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in self.end_ids)),
            ("generation prompt", repr(self.generation_prompt)),
            ("added before the answer", repr(self.before_answer) if self.before_answer else "nothing"),
            (
                "system prompt when a row has none",
                repr(self.default_system) if self.default_system else "none is added",
            ),
            ("accepts a system message", yes[self.takes_system]),
            (
                "shows tool lists / calls / results",
                " / ".join(yes[v] for v in (self.shows_tools, self.shows_tool_calls, self.shows_tool_results)),
            ),
            ("keeps <think> of earlier turns", yes[self.keeps_thinking]),
            (
                "beginning of sequence",
                "written by the template"
                if not self.adds_bos
                else "the tokenizer would add one; the template writes none",
            ),
        ]

    def _repr_html_(self) -> str:
        from helpers.display import table

        return table(self.facts(), ("chat template", "as its renderings show"))

    def __repr__(self) -> str:
        return "\n".join(f"{what}: {how}" for what, how in self.facts())


def inspect(tokenizer: Any) -> Template:
    """Find out what the tokenizer's chat template does.

    Raises TunebookError when there is no template, when it cannot be rendered within the limits, or when it ends the
    assistant's turn with no special token: a model trained with it could not learn to stop.
    """
    if not tokenizer.chat_template:
        raise TunebookError(
            "The tokenizer has no chat template; choose an instruct model, or give its folder a chat_template.jinja."
        )
    if isinstance(tokenizer.chat_template, dict):
        raise TunebookError(
            "The tokenizer has several chat templates under names; keep the one to train with as chat_template.jinja."
        )
    added = tokenizer.added_tokens_decoder
    special = {i: str(token) for i, token in added.items() if token.special} | {
        tokenizer.convert_tokens_to_ids(t): t for t in tokenizer.all_special_tokens
    }
    pattern = re.compile(
        "|".join(re.escape(text) for text in sorted(special.values(), key=len, reverse=True)) or r"(?!)"
    )
    question, answer = {"role": "user", "content": "QQQ"}, {"role": "assistant", "content": "AAA"}

    def probe(messages: list[dict], tools: list | None = None, generation: bool = False) -> str:
        with guarded(PROBE_SECONDS):
            return _checked(
                tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation),
                messages,
            )

    def attempt(messages: list[dict], tools: list | None = None) -> str:
        with contextlib.suppress(RowError):
            return probe(messages, tools)
        return ""

    try:
        prompt, prompt_open, full = probe([question]), probe([question], generation=True), probe([question, answer])
    except RowError as error:
        raise TunebookError(
            f"The chat template cannot render a question and an answer: {error.detail}. Choose another model, or mend the template."
        ) from None
    if "AAA" not in full or "QQQ" not in full:
        raise TunebookError(
            "The chat template leaves out the question or the answer; choose another model, or mend the template."
        )
    ends = [match.group() for match in [pattern.search(full, full.rindex("AAA"))] if match]
    if not ends:
        raise TunebookError(
            "The chat template ends the assistant's turn with no special token, so a model trained with it could not learn to stop; "
            "choose an instruct model, or mend the template."
        )
    call = {"type": "function", "function": {"name": "FFF", "arguments": {"KKK": "VVV"}}}
    tool = {
        "type": "function",
        "function": {"name": "TTT", "description": "DDD", "parameters": {"type": "object", "properties": {}}},
    }
    called = attempt([question, {"role": "assistant", "content": "", "tool_calls": [call]}])
    if "FFF" in called and "VVV" in called and (match := pattern.search(called, called.rindex("VVV"))):
        ends.append(match.group())
    result = attempt(
        [
            question,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "RRR", "name": "FFF"},
            answer,
        ]
    )
    thought = attempt([question, {"role": "assistant", "content": "<think>HHH</think>AAA"}, question, answer])
    system = attempt([{"role": "system", "content": "SSS"}, question])
    ids = {text: i for i, text in special.items()}
    head = prompt[: prompt.index("QQQ")]
    bare = pattern.sub("", head)
    plain_head = pattern.sub("", system[: system.index("QQQ")].replace("SSS", "")) if "SSS" in system else ""
    start = full[len(prompt_open) : full.index("AAA")] if full.startswith(prompt_open) else ""
    bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return Template(
        tokenizer=tokenizer,
        end_ids=tuple(dict.fromkeys(ids[text] for text in ends)),
        generation_prompt=prompt_open[len(prompt) :] if prompt_open.startswith(prompt) else "",
        before_answer=start,
        default_system=_without_roles(bare, plain_head),
        shows_tools="TTT" in attempt([question, answer], [tool]),
        shows_tool_calls="FFF" in called and "VVV" in called,
        shows_tool_results="RRR" in result,
        takes_system="SSS" in system,
        keeps_thinking="HHH" in thought,
        has_markers=bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template)),
        adds_bos=bool(bos and not full.startswith(tokenizer.bos_token)),
        special_ids=frozenset(special),
        special_text=pattern,
    )


def _without_roles(head: str, plain: str) -> str:
    """The text before the first question, less what stands there around any system message (role names, line breaks)."""
    words = head
    for line in {line.strip() for line in plain.splitlines() if line.strip()}:
        words = re.sub(rf"(?m)^\s*{re.escape(line)}\s*$", "", words)
    return words.strip()


def render(
    template: Template, conversations: list[tuple[list[dict], str | None]], generation: bool = False
) -> list[str | RowError]:
    """Each (messages, tools as JSON text) as the tokenizer's own template writes it; a RowError where it refuses."""
    plain = all(tools is None for _, tools in conversations)
    tokenizer = template.tokenizer
    if plain and conversations:
        try:
            with guarded(BATCH_SECONDS):
                texts = tokenizer.apply_chat_template(
                    [messages for messages, _ in conversations], tokenize=False, add_generation_prompt=generation
                )
            return [_checked(text, messages) for text, (messages, _) in zip(texts, conversations, strict=True)]
        except RowError:
            pass  # one conversation that the template refuses fails the whole batch: take them one by one
    return [_render_one(tokenizer, messages, tools, generation) for messages, tools in conversations]


def _render_one(tokenizer: Any, messages: list[dict], tools: str | None, generation: bool) -> str | RowError:
    try:
        with guarded(PROBE_SECONDS):
            listed = json.loads(tools) if tools else None
            return _checked(
                tokenizer.apply_chat_template(messages, tools=listed, tokenize=False, add_generation_prompt=generation),
                messages,
            )
    except RowError as error:
        return error


def _checked(text: str, messages: list[dict]) -> str:
    if len(text) > MAX_ADDED and len(text) > MAX_ADDED + MAX_GROWTH * sum(len(str(m)) for m in messages):
        raise RowError(
            "template refused",
            f"the template wrote {len(text):,} characters; that is no rendering of this conversation",
        )
    return text


class _TooLong(Exception):
    pass


@contextlib.contextmanager
def guarded(seconds: float) -> Iterator[None]:
    """Run a template under a time limit and a memory limit, its errors turned into RowError("template refused").

    The time limit needs the main thread (signals), the memory limit Linux; elsewhere only the sandbox holds.
    """
    import jinja2

    def ring(*_: Any) -> None:
        raise _TooLong

    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    old = signal.signal(signal.SIGALRM, ring) if timed else None
    limits = _limit_memory()
    try:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except _TooLong:
        raise RowError("template refused", f"the template did not finish within {seconds:g} s") from None
    except MemoryError:
        raise RowError("template refused", f"the template wanted more than {HEADROOM // 2**30} GiB of memory") from None
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        ZeroDivisionError,
        OverflowError,
        RecursionError,
    ) as error:
        raise RowError(
            "template refused", f"the chat template says: {str(error)[:200] or type(error).__name__}"
        ) from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        _restore_memory(limits)


def _limit_memory() -> tuple[int, int] | None:
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + HEADROOM
        if (soft != resource.RLIM_INFINITY and soft < wanted) or (hard != resource.RLIM_INFINITY and hard < wanted):
            return None
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    except (ImportError, OSError, ValueError):
        return None
    return soft, hard


def _restore_memory(limits: tuple[int, int] | None) -> None:
    if limits is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, limits)
