"""What fine-tuning cost: loss on general text, easy general questions, refusals and manners, before and after.

The base is measured on its own weights, never wrapped by an adapter, and every token is predicted from those before it.
Both sound obvious; a published script got both wrong, so both have a test.
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

CHAT_TOKENS = 48  # enough to tell a refusal or a greeting from a query
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


def chat(session: Session, rows: Sequence[dict[str, Any]], thinking: Marks = ()) -> dict[str, float]:
    """The shares that pass: "refusals" of prompts to be refused, "chat manners" of small talk."""
    prompts = [[{"role": "user", "content": r["prompt"]}] for r in rows]
    answers, _ = session.answers(prompts, Decoding(CHAT_TOKENS), f"{session.candidate.name}, manners")
    passed: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if row.get("kind") in CHECKS and not answer.failed:
            label, passes = CHECKS[row["kind"]]
            passed.setdefault(label, []).append(passes(without_thinking(answer.text, thinking)))
    return {label: sum(one) / len(one) for label, one in passed.items()}


def change(base: Sequence[tuple[float, int]], tuned: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """(change, low, high): tuned minus base loss per token on the same texts, 95 % interval by resampling texts."""
    a, b = np.array(base, float), np.array(tuned, float)
    ours, theirs = (statistics.bootstrap(nats, sizes=tokens) for nats, tokens in (b.T, a.T))  # one seed: the same texts
    return float(b[:, 0].sum() / b[:, 1].sum() - a[:, 0].sum() / a[:, 1].sum()), *statistics.middle(ours - theirs)


def judge(
    baseline: str,
    losses: Mapping[str, dict[str, Any]],
    shares: Mapping[str, dict[str, float]],
    threshold: dict[str, float],
    trained: dict[str, Any],
) -> dict[str, Any]:
    """scores.json's `forgetting`: each candidate against the baseline, its verdict, and advice when one fails.

    losses and shares (candidate → {task: share right}) are independent, either may be empty. threshold: nats a token
    that general text may lose (loss_increase), share that a task may (task_drop). trained: rank and replay share of
    this run's training.
    """
    found, before = {}, shares.get(baseline, {})
    for name in dict.fromkeys([*losses, *shares]):
        record: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "n", "tokens", "change", "low", "high"))
        drops, kept = [], "kept what it knew"
        if name in losses and baseline in losses:
            record |= {k: v for k, v in losses[name].items() if k != "per_text"}
            delta, low, high = change(losses[baseline]["per_text"], losses[name]["per_text"])
            record |= {"change": delta, "low": low, "high": high}
            kept += f": general text {delta:+.2f} nats a token (95 % interval {low:+.2f} to {high:+.2f})"
            if delta > (allowed := threshold["loss_increase"]):
                drops.append(f"general text costs {delta:.2f} nats a token more (allowed {allowed:.2f})")
        tasks = {t: {"base": before[t], "value": v} for t, v in shares.get(name, {}).items() if t in before}
        fell = [(task, one) for task, one in tasks.items() if one["base"] - one["value"] > threshold["task_drop"]]
        drops += [f"{task} fell from {100 * one['base']:.0f} to {100 * one['value']:.0f} %" for task, one in fell]
        sentence = "the measure before training" if name == baseline else kept
        sentence = "forgot: " + "; ".join(drops) if drops else sentence
        found[name] = {**record, "tasks": tasks, "passed": not drops, "sentence": sentence}
    failed = [n for n, f in found.items() if not f["passed"]]
    said = advice(failed, trained.get("rank"), trained.get("replay")) if failed else []
    return {"baseline": baseline, "threshold": threshold, "candidates": found, "advice": said}


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
