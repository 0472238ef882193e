"""Does the model prefer the chosen answer of held-out pairs, by its probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.evaluate import statistics
from helpers.evaluate.candidates import Session


def read(path: Path, limit: int = 0) -> list[dict[str, Any]]:
    """Pairs of a preference_eval.parquet: {"prompt": messages, "chosen": text, "rejected": text}."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["prompt", "chosen", "rejected"]).to_pylist()
    pairs = [{"prompt": r["prompt"]} | {side: r[side][-1]["content"] for side in ("chosen", "rejected")} for r in rows]
    return pairs[:limit] if limit else pairs


def log_odds(mean_logp: float) -> float:
    """log(p / (1 - p)) of a mean token probability, the quantity ORPO trains (Hong et al. 2024, https://arxiv.org/abs/2403.07691)."""
    mean_logp = min(mean_logp, -1e-9)
    return mean_logp - math.log(-math.expm1(mean_logp))


def score(session: Session, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """accuracy: share of pairs whose chosen answer has the higher mean token log-probability, end of turn included;
    log_odds: mean difference of the log-odds. An empty completion is left out; n: how many pairs count."""
    both = session.completion_logprobs([(p["prompt"], p[side]) for p in pairs for side in ("chosen", "rejected")])
    odds = [log_odds(total / count) if count and math.isfinite(total) else None for total, count in both]
    margins = _differences(odds[1::2], odds[::2])
    margin = statistics.share(margins, "nats")
    return {
        "accuracy": statistics.share([_right(m) for m in margins]),
        "log_odds": margin,
        "log_odds_chosen": statistics.share(odds[::2], "nats")["value"],
        "log_odds_rejected": statistics.share(odds[1::2], "nats")["value"],
        "win_rate": None,
        "n": margin["n"],
        "margins": margins,
    }


def win_rates(results: dict[str, dict[str, Any]], baseline: str) -> dict[str, dict[str, Any]]:
    """The results with win_rate: on what share of pairs the candidate's margin beats the baseline's; ties are half."""
    reference = results.get(baseline, {}).get("margins")
    found = {}
    for name, result in results.items():
        found[name] = {k: v for k, v in result.items() if k != "margins"}
        if reference is not None and name != baseline:
            gains = _differences(reference, result["margins"])
            found[name]["win_rate"] = statistics.share([_right(g) for g in gains])
    return found


def _differences(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    """b - a, None where either is undefined."""
    return [None if x is None or y is None else y - x for x, y in zip(a, b, strict=True)]


def _right(margin: float | None) -> float | None:
    return None if margin is None else 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
