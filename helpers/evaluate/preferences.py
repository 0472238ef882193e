"""Does the model prefer the chosen answer: on held-out pairs, by probability and, where answers can be compared, by what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.evaluate import statistics


def read(path: Path, limit: int = 0) -> list[dict[str, Any]]:
    """Pairs of a preference_eval.parquet: {"id", "prompt": messages, "chosen": text, "rejected": text}."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["id", "prompt", "chosen", "rejected"]).to_pylist()
    pairs = [
        {
            "id": str(r["id"]),
            "prompt": [dict(m) for m in r["prompt"]],
            "chosen": r["chosen"][-1]["content"],
            "rejected": r["rejected"][-1]["content"],
        }
        for r in rows
    ]
    return pairs[:limit] if limit else pairs


def log_odds(mean_logp: float) -> float:
    """log(p / (1 - p)) of a mean token probability, the quantity ORPO trains (Hong et al. 2024, https://arxiv.org/abs/2403.07691)."""
    mean_logp = min(mean_logp, -1e-9)
    return mean_logp - math.log(-math.expm1(mean_logp))


def score(session: Any, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """accuracy: share of pairs whose chosen answer has the higher mean token log-probability (end of turn included); log_odds: mean
    difference of the log-odds, with intervals. The undefined (an empty completion) is left out and n says how many count."""
    both = session.completion_logprobs([(p["prompt"], p[side]) for p in pairs for side in ("chosen", "rejected")])
    odds = [log_odds(total / count) if count and math.isfinite(total) else None for total, count in both]
    chosen, rejected = odds[::2], odds[1::2]
    margins = [a - b if a is not None and b is not None else None for a, b in zip(chosen, rejected, strict=True)]
    right = [None if m is None else (1.0 if m > 0 else 0.5 if m == 0 else 0.0) for m in margins]
    return {
        "accuracy": statistics.share(right),
        "log_odds": statistics.mean(margins, "nats"),
        "log_odds_chosen": _mean(chosen),
        "log_odds_rejected": _mean(rejected),
        "win_rate": None,
        "n": sum(m is not None for m in margins),
        "margins": margins,
    }


def win_rates(results: dict[str, dict[str, Any]], baseline: str) -> None:
    """Fill in win_rate: on what share of pairs the candidate's margin beats the baseline's; ties are half. `margins` are taken out."""
    reference = results.get(baseline, {}).get("margins")
    for name, result in results.items():
        margins = result["margins"]
        if reference is not None and name != baseline:
            wins = [
                None if a is None or b is None else (1.0 if b > a else 0.5 if b == a else 0.0)
                for a, b in zip(reference, margins, strict=True)
            ]
            result["win_rate"] = statistics.share(wins)
    for result in results.values():
        result.pop("margins", None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
