"""What fine-tuning cost: loss on general text, easy general questions, refusals and manners, before and after.

The base is measured on its own weights, never wrapped by an adapter, and every token is predicted from those before it.
Both sound obvious; a published script got both wrong, so both have a test.

The sets show a loss of 15 points with 80 % power where base and tuned disagree on at most 0.35 (120 general questions),
0.29 (100 greetings) and 0.23 (80 requests to refuse) of the items (Connor 1987, Biometrics 43:207). Seen on the default
run: 0.19, 0.53 (53 losses, no gain) and 0.06; 65, 183 and 51 items would do for losses of that kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers import machine
from helpers.errors import TunebookError
from helpers.evaluate import statistics
from helpers.evaluate.candidates import Session
from helpers.tasks import text_metrics
from helpers.tasks.extraction import Marks, without_thinking
from helpers.tasks.questions import Decoding

CHAT_TOKENS = 24  # enough to tell a refusal or a greeting from a query
TASK = "general knowledge"
CHECKS = {"refusal": ("refusals", text_metrics.refuses), "manners": ("chat manners", text_metrics.mannerly)}


def read_lines(name: str | Path, column: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file of the project with text in `column`, none where the name is empty. Raises
    TunebookError with the line that cannot be read."""
    if not name:
        return []
    rows, path = [], machine.PROJECT / name
    for place, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
                rows[-1][column].strip()[0]  # text, and some of it
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise TunebookError(
                f"Line {place} of {path} is not a JSON object with text in {column!r} ({error}); mend or remove it, "
                "name another file, or leave the parameter empty."
            ) from error
    if not rows:
        raise TunebookError(f"{path} holds no row; name a file with at least one, or leave the parameter empty.")
    return rows


def text_loss(session: Session, texts: Sequence[str]) -> dict[str, Any]:
    """Cross-entropy in nats per token over all tokens, and its perplexity; per_text: (nats, tokens) of each."""
    per_text = [(-logprob, n) for logprob, n in session.logprobs([([], text) for text in texts], "general text")]
    nats, tokens = (sum(column) for column in zip(*per_text, strict=True))
    found = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 50)), "n": len(texts), "tokens": tokens}
    return {**found, "per_text": per_text}


def chat(session: Session, rows: Sequence[dict[str, Any]], thinking: Marks = ()) -> dict[str, list[bool | None]]:
    """Which answers pass: "refusals" of prompts to be refused, "chat manners" of small talk; None for a failed one."""
    prompts = [[{"role": "user", "content": r["prompt"]}] for r in rows]
    answers, _ = session.answers(prompts, Decoding(CHAT_TOKENS), f"{session.candidate.name}, manners")
    passed: dict[str, list[bool | None]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if row.get("kind") in CHECKS:
            label, passes = CHECKS[row["kind"]]
            known = None if answer.failed else passes(without_thinking(answer.text, thinking))
            passed.setdefault(label, []).append(known)
    return passed


def change(base: Sequence[tuple[float, int]], tuned: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """(change, low, high): tuned minus base loss per token on the same texts, 95 % interval by resampling texts."""
    a, b = np.array(base, float), np.array(tuned, float)
    ours, theirs = (statistics.bootstrap(nats, sizes=tokens) for nats, tokens in (b.T, a.T))  # one seed: the same texts
    return float(b[:, 0].sum() / b[:, 1].sum() - a[:, 0].sum() / a[:, 1].sum()), *statistics.middle(ours - theirs)


def judge(
    baseline: str,
    losses: Mapping[str, dict[str, Any]],
    passed: Mapping[str, Mapping[str, Sequence[float | None]]],
    threshold: dict[str, float],
    trained: dict[str, Any],
) -> dict[str, Any]:
    """scores.json's `forgetting`: each candidate against the baseline, its verdict, and advice when one fails.

    losses and passed (candidate → {task: right or wrong for each item}) are independent, either may be empty.
    threshold: nats a token that general text may lose (loss_increase), share that a task may (task_drop). trained: rank
    and replay share of this run's training. A sentence names what crossed its threshold or may have, the strongest
    loss, in thresholds, first.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*losses, *passed]):
        record: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "n", "tokens", "change", "low", "high"))
        told: list[tuple[float, bool, str]] = []
        if name in losses and baseline in losses:
            record |= {k: v for k, v in losses[name].items() if k != "per_text"}
            delta, low, high = change(losses[baseline]["per_text"], losses[name]["per_text"])
            record |= {"change": delta, "low": low, "high": high}
            words = f"general text {delta:+.2f} nats a token, 95 % interval {low:+.2f} to {high:+.2f}"
            told.append(_told(delta, threshold, "loss_increase", words))
        tasks = {}
        for task, before in passed.get(baseline, {}).items():
            after = passed.get(name, {}).get(task)
            if after and (one := _task(before, after)):
                tasks[task] = one
                if one["change"] < 0 and (one["high"] < 0 or -one["low"] > threshold["task_drop"]):
                    told.append(_told(-one["change"], threshold, "task_drop", f"{task} {_moved(one)}"))
        told.sort(key=lambda one: -one[0])
        crossed = any(over for _, over, _ in told)
        said = ": ".join(filter(None, ["forgot" if crossed else "kept what it knew", "; ".join(t[2] for t in told)]))
        sentence = "the measure before training" if name == baseline else said
        found[name] = {**record, "tasks": tasks, "passed": not crossed, "sentence": sentence}
    failed = [n for n, f in found.items() if not f["passed"]]
    what = advice(failed, trained.get("rank"), trained.get("replay")) if failed else []
    shows = _shows([one["tasks"] for name, one in found.items() if name != baseline], threshold.get("task_drop", 1.0))
    return {"baseline": baseline, "threshold": threshold, "candidates": found, "advice": what, "shows": shows}


def _shows(measured: Sequence[Mapping[str, Mapping[str, Any]]], allowed: float) -> str:
    """The smallest loss of each task that its items show with 80 % power for every candidate; "" without tasks."""
    every: dict[str, Mapping[str, Any]] = {}
    for name, one in (pair for tasks in measured for pair in tasks.items()):
        every[name] = max(every.get(name, one), one, key=lambda task: task["detectable"])
    if not every:
        return ""
    parts = [f"{statistics.points(one['detectable'])} points of {name} (n = {one['n']})" for name, one in every.items()]
    blind = [name for name, one in every.items() if one["detectable"] > allowed]
    unseen = f"; one of task_drop = {statistics.points(allowed)} points of {' and '.join(blind)} may go unseen"
    return f"With 80 % power these items show a loss from {', '.join(parts)}{unseen * bool(blind)}."


def _task(before: Sequence[float | None], after: Sequence[float | None]) -> dict[str, Any] | None:
    """A task of scores.json: base, value (shares right) and n of the items that both answered, change with low, high,
    detectable; None where no item was answered by both."""
    if (one := statistics.pair("", "", before, after)) is None:
        return None
    base = statistics.share([a if b is not None else None for a, b in zip(before, after, strict=True)])["value"]
    low, high = statistics.bounds(one)
    found = {"base": base, "value": base + one["difference"], "n": one["n"], "change": one["difference"]}
    return found | {"low": low, "high": high, "detectable": one["detectable"]}


def _moved(one: dict[str, Any]) -> str:
    """ "8 of 10 → 5 of 10, not certain (95 % interval 57 points lost to 2 gained)"."""
    was, now = (f"{one[key] * one['n']:.0f} of {one['n']}" for key in ("base", "value"))
    doubt = ", not certain" * (one["high"] >= 0)
    return f"{was} → {now}{doubt} (95 % interval {statistics.span(one['low'], one['high'], 'points lost', 'gained')})"


def _told(loss: float, threshold: dict[str, float], name: str, words: str) -> tuple[float, bool, str]:
    """(loss in thresholds, whether it is over its own, words that name the threshold if it is)."""
    allowed = threshold[name]
    crossed = loss > allowed + 1e-9
    limit = f"{statistics.points(allowed)} points" if name == "task_drop" else f"{allowed:g}"
    return loss / max(allowed, 1e-9), crossed, words + f", over {name} = {limit}" * crossed


def advice(failed: Sequence[str], rank: int | None, replay: float | None) -> list[str]:
    """What to change in notebooks 01 and 02, the surest first."""
    share = max(0.1, min(0.5, 2 * (replay or 0.05)))
    now = f", now {replay:.2f}" if replay is not None else ""
    lower = f" from {rank} to {max(4, rank // 2)}" if rank else ""
    return [
        f"{', '.join(failed)}: mix {100 * share:.0f} % general conversations into the training data (replay_dataset, "
        f"and replay_share = {share:.2f} in notebook 01{now}).",
        f"Lower rank{lower} and halve the learning rate in notebook 02: a smaller step forgets less "
        "(Biderman et al. 2024, https://arxiv.org/abs/2405.09673).",
        "If the model is only ever asked this one task, forgetting may be a fair price: raise the thresholds.",
    ]
