"""What a GGUF file is measured on, and the measurement itself in the llama.cpp runtime, in a process without torch.

Texts and conversations on which its tokenizer and template must agree with the trained model's; then the four gates.
The divergence is what llama.cpp's own perplexity tool computes, with the trained model as the reference instead of
another GGUF: sum over the vocabulary of p (ln p - ln q), p the trained model's next-token distribution, in nats a
token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers.data import chat_template
from helpers.data.turns import RowError
from helpers.errors import TunebookError
from helpers.gguf.llama_cpp import LlamaCpp

# A top-1 token counts as changed when the reference preferred it by more than this; a tie may break the other way.
TIE_NATS = 1e-2
_KEPT = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TEXTS: list[str] = _KEPT["texts"]
TOOL: dict[str, Any] = _KEPT["tool"]
# shape -> (messages, needed): a needed shape that differs in the Go template makes it unusable, another is reported
SHAPES: dict[str, tuple[list[dict[str, str]], bool]] = {
    c["shape"]: (c["messages"], c["needed"]) for c in _KEPT["conversations"]
}
QUESTION = SHAPES["one question"][0]


def conversations() -> dict[str, tuple[list[dict[str, str]], list[dict[str, Any]] | None]]:
    """Shape -> (messages, tools) that every runtime must render as the trained tokenizer does."""
    needed = {shape: (messages, None) for shape, (messages, needed) in SHAPES.items() if needed}
    return {**needed, "tools": (QUESTION, [TOOL])}


def token_texts(tokenizer: Any) -> list[str]:
    """TEXTS, and each added token between plain words: the place where conversions lose them."""
    added = sorted(str(t) for t in tokenizer.added_tokens_decoder.values())[:64]
    return [*TEXTS, *(f"before{t}after {t}\n{t}" for t in added)]


def render(tokenizer: Any, messages: list[dict], tools: list[dict] | None) -> tuple[str | None, str]:
    """The prompt of the tokenizer's own template; (None, why) where the template has no such shape."""
    try:
        text = chat_template.prompt(tokenizer, messages, tools)
        if tools and text == chat_template.prompt(tokenizer, messages):
            return None, "the template does not print tools"
    except RowError as error:
        return None, str(error)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if system and system.splitlines()[0] not in text:
        return None, "the template drops the system message"
    return text, ""


# ---------------------------------------------------------------- the measurement


@dataclass
class Result:
    """What was found about one file. KL in nats a token; shares from 0 to 1; failed: gate -> what was found.

    weights_kl: of the same weights unpacked, in the trained model's own arithmetic; runtime_kl: the rest.
    """

    type: str
    tokens: int = 0
    mean_kl: float = 0.0
    p99_kl: float = 0.0
    top1: float = 0.0
    perplexity: float = 0.0
    reference_perplexity: float = 0.0
    weights_kl: float | None = None
    runtime_kl: float | None = None
    token_texts: int = 0
    prompt_shapes: list[str] = field(default_factory=list)
    skipped_shapes: dict[str, str] = field(default_factory=dict)
    answers: int = 0
    same_answers: int = 0
    stopped: int = 0
    reference_stopped: int = 0
    task_score: float | None = None
    task_count: int = 0  # questions behind it
    failed: dict[str, str] = field(default_factory=dict)


def measure(request: dict[str, Any], _: object = None) -> dict[str, Any]:
    """`Result` of the file request["path"] against what `fidelity.Reference` wrote to request["reference"]."""
    folder = Path(request["reference"])
    reference = json.loads((folder / "reference.json").read_text())
    result = Result(request["kind"], reference_perplexity=reference["perplexity"])
    with LlamaCpp(request["path"], parallel=max(len(reference["prompts"]), 1)) as runtime:
        _token_ids(runtime, reference, result)
        _prompts(runtime, reference, result)
        _logits(runtime, reference, folder / "logprobs.f32", result, request)
        _answers(runtime, reference, result)
    return asdict(result)


def _token_ids(runtime: LlamaCpp, reference: dict[str, Any], result: Result) -> None:
    result.token_texts = len(reference["texts"])
    for text, plain, special in reference["texts"]:
        for add_special, theirs in ((False, plain), (True, special)):
            mine = runtime.tokenize(text, add_special=add_special)
            # where the template writes the BOS itself, the two differ by it; the prompt gate counts it
            if mine != theirs and not (add_special and special == plain):
                at = _first_difference(mine, theirs)
                near = slice(max(0, at - 1), at + 3)
                result.failed["token ids"] = (
                    f"{text[:40]!r} is read as {mine[near]} from token {at} on, the trained model had {theirs[near]}"
                )
                return


def _prompts(runtime: LlamaCpp, reference: dict[str, Any], result: Result) -> None:
    """One conversation through the trained tokenizer's template and llama.cpp's server: one text, one list of ids."""
    bos, bos_text = reference["bos"], reference["bos_text"]
    for shape, messages, tools, text, why, ids in reference["conversations"]:
        if text is None:
            result.skipped_shapes[shape] = why
            continue
        try:
            got = runtime.apply_template(messages, tools)
        except TunebookError as error:
            result.failed["prompt"] = f"for {shape} llama.cpp says: {str(error)[:160]}"
            return
        mine = runtime.tokenize(got, add_special=True)
        if mine[:1] == [bos] and ids[:1] != [bos]:
            mine = mine[1:]
        got, text = got.removeprefix(bos_text), text.removeprefix(bos_text)  # the runtime may write it as a token
        if mine != ids or got != text:
            at = _first_difference(got, text)
            near = slice(max(0, at - 12), at + 24)
            result.failed["prompt"] = f"for {shape} it reads {got[near]!r} where the training had {text[near]!r}"
            return
        result.prompt_shapes.append(shape)


def _first_difference(mine: Sequence[Any], theirs: Sequence[Any]) -> int:
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


def _logits(runtime: LlamaCpp, reference: dict[str, Any], kept: Path, result: Result, request: dict[str, Any]) -> None:
    import numpy as np

    following = np.concatenate([np.asarray(r[1:], dtype=np.int64) for r in reference["rows"]])
    logprobs: np.ndarray = np.memmap(kept, np.float32, "r", shape=(len(following), reference["vocabulary"]))
    kl, same, loss, at = [], [], 0.0, 0
    for row in reference["rows"]:
        for logits in runtime.iter_logits(row[:-1]):
            # a padded vocabulary may differ in rows that no text reaches
            width, rows = min(logprobs.shape[1], logits.shape[1]), np.arange(len(logits))
            theirs = np.asarray(logprobs[at : at + len(logits), :width])
            mine = logits[:, :width] - logits[:, :width].max(1, keepdims=True)
            mine -= np.log(np.exp(mine).sum(1, keepdims=True))
            kl.append(np.einsum("tv,tv->t", np.exp(theirs), theirs - mine))
            same.append(theirs.max(1) - theirs[rows, mine.argmax(1)] < TIE_NATS)
            loss -= float(mine[rows, following[at : at + len(mine)]].sum())
            at += len(logits)
    divergence = np.concatenate(kl)
    result.tokens = len(divergence)
    result.mean_kl, result.p99_kl = float(max(divergence.mean(), 0.0)), float(np.quantile(divergence, 0.99))
    result.top1, result.perplexity = float(np.concatenate(same).mean()), math.exp(min(loss / len(divergence), 700.0))
    most, least = request["most_kl"], request["least_top1"]
    if not math.isfinite(result.mean_kl) or result.mean_kl > most or result.top1 < least:
        result.failed["logits"] = (
            f"mean KL {result.mean_kl:.3g} (at most {most:g}), top-1 agreement {result.top1:.1%} (at least {least:.1%})"
            f" over {result.tokens} tokens"
        )


def _answers(runtime: LlamaCpp, reference: dict[str, Any], result: Result) -> None:
    """Greedy answers, all at once as the trained model gave them."""
    made = runtime.generate(reference["prompts"], max_tokens=reference["max_tokens"])
    theirs = reference["answers"]
    result.answers, result.stopped = len(made), sum(m.finish == "stop" for m in made)
    result.same_answers = sum(m.token_ids == ids for m, (ids, _) in zip(made, theirs, strict=True))
    result.reference_stopped = sum(stopped for _, stopped in theirs)
    # The classic failure is a file that runs on where the trained model stops; one answer in four may differ.
    if result.reference_stopped - result.stopped > max(1, len(made) // 4):
        result.failed["stopping"] = (
            f"{result.stopped} of {len(made)} answers end by themselves within {reference['max_tokens']} tokens, "
            f"{result.reference_stopped} do in the trained model"
        )
