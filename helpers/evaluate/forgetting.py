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

from helpers.errors import TunebookError
from helpers.evaluate import statistics
from helpers.evaluate.candidates import Session
from helpers.tasks import text_metrics
from helpers.tasks.questions import Decoding

CHAT_TOKENS = 48  # enough to tell a refusal or a greeting from a query
TASK = "general knowledge"
SHARES = {"refusal_rate": "refusals", "manners": "chat manners"}


def read_lines(path: Path, column: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file that have text in `column`. Raises TunebookError with the line that cannot be read."""
    rows, place = [], 0
    try:
        for line in Path(path).read_text(encoding="utf-8").split("\n"):
            place += 1
            if line.strip():
                rows.append(json.loads(line))
                rows[-1][column].strip()[0]  # text, and some of it
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TunebookError(
            f"Line {place} of {path} is not a JSON object with text in {column!r} ({error}); mend or remove it, name "
            "another file, or leave the parameter empty."
        ) from error
    if not rows:
        raise TunebookError(f"{path} holds no row; name a file with at least one, or leave the parameter empty.")
    return rows


def text_loss(session: Session, texts: Sequence[str]) -> dict[str, Any]:
    """Cross-entropy in nats per token over all tokens, its perplexity, and bits per UTF-8 byte, which compares across
    tokenizers. per_text: (nats, tokens) of each, for the paired interval.
    """
    per_text = [(-logprob, n) for logprob, n in session.logprobs([([], text) for text in texts], "general text")]
    nats, tokens = sum(n for n, _ in per_text), sum(t for _, t in per_text)
    size = sum(len(t.encode()) for t in texts)
    found = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 50)), "n": len(texts), "tokens": tokens}
    return {**found, "bits_per_byte": nats / math.log(2) / size, "per_text": per_text}


def chat(session: Session, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """refusal_rate over prompts to be refused, manners over small talk: shares that pass; n: how many were asked."""
    prompts = [[{"role": "user", "content": r["prompt"]}] for r in rows]
    answers, _ = session.answers(prompts, Decoding(CHAT_TOKENS), f"{session.candidate.name}, manners")

    def share(kind: str, passes: Any) -> float | None:
        passed = [passes(a.text) for r, a in zip(rows, answers, strict=True) if r.get("kind") == kind and not a.failed]
        return sum(passed) / len(passed) if passed else None

    rates = share("refusal", text_metrics.refuses), share("manners", text_metrics.mannerly)
    return {"refusal_rate": rates[0], "manners": rates[1], "n": len(rows)}


def change(base: Sequence[tuple[float, int]], tuned: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """(change, low, high): tuned minus base loss per token on the same texts, 95 % interval by resampling texts."""
    a, b = np.array(base, float), np.array(tuned, float)
    ours, theirs = (statistics.bootstrap(nats, sizes=tokens) for nats, tokens in (b.T, a.T))  # one seed: the same texts
    return float(b[:, 0].sum() / b[:, 1].sum() - a[:, 0].sum() / a[:, 1].sum()), *statistics.middle(ours - theirs)


def judge(
    baseline: str,
    losses: Mapping[str, dict[str, Any]],
    chats: Mapping[str, dict[str, Any]],
    tasks: Mapping[str, dict[str, float]],
    loss_increase: float,
    task_drop: float,
    rank: int | None = None,
    replay: float | None = None,
) -> dict[str, Any]:
    """scores.json's `forgetting`: each candidate against the baseline, its verdict, and advice when one fails.

    losses, chats and tasks (candidate → {task: share right}) are independent, each may be empty. loss_increase: nats a
    token that general text may lose; task_drop: share that general tasks, refusals and manners may lose. rank, replay:
    what this run was trained with, for the advice.
    """
    found = {}
    for name in dict.fromkeys([*losses, *chats, *tasks]):
        record: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "n", "tokens", "bits_per_byte"))
        record |= {"change": None, "low": None, "high": None}
        drops, kept = [], "kept what it knew"
        if name in losses and baseline in losses:
            record |= {k: v for k, v in losses[name].items() if k != "per_text"}
            delta, low, high = change(losses[baseline]["per_text"], losses[name]["per_text"])
            record |= {"change": delta, "low": low, "high": high}
            kept += f": general text {delta:+.2f} nats a token (95 % interval {low:+.2f} to {high:+.2f})"
            if delta > loss_increase:
                drops.append(f"general text costs {delta:.2f} nats a token more (allowed {loss_increase:.2f})")
        talk, known = chats.get(name, {}), tasks.get(baseline, {})
        record |= {k: talk.get(k) for k in SHARES}
        record["tasks"] = {t: {"base": known[t], "value": v} for t, v in tasks.get(name, {}).items() if t in known}
        pairs: list[tuple[str, Any, Any]] = [(t, v["base"], v["value"]) for t, v in record["tasks"].items()]
        pairs += [(label, chats.get(baseline, {}).get(k), talk.get(k)) for k, label in SHARES.items()]
        for label, before, after in pairs:
            if None not in (before, after) and before - after > task_drop:
                drops.append(f"{label} fell from {100 * before:.0f} to {100 * after:.0f} %")
        sentence = "forgot: " + "; ".join(drops) if drops else kept
        record |= {"passed": not drops, "sentence": "the measure before training" if name == baseline else sentence}
        found[name] = record
    failed = [n for n, f in found.items() if not f["passed"]]
    threshold = {"loss_increase": loss_increase, "task_drop": task_drop}
    said = advice(failed, rank, replay) if failed else []
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
