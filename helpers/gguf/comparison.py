"""Size against what it costs: the recommendation, the table and the figure that close the export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helpers import display, plots
from helpers.gguf.probes import Result
from helpers.gguf.quantize import TYPES, Quantised

CLOSE = 0.1  # mean KL, nats a token, up to which a file's answers are practically the merged model's
FEW = 0.02  # a task score this far below the best counts as good as the best, however many questions there were


def recommend(files: Sequence[Quantised], results: Sequence[Result]) -> dict[str, str]:
    """{"type", "why"}: the smallest file that passes its gates, diverges little and does the task as well as the
    best.

    "As well" allows for chance: with few questions two files differ by a standard error of their difference for no
    reason.
    """
    by_type = {r.type: r for r in results}
    sound = [(f, by_type[f.type]) for f in files if f.type in by_type and not by_type[f.type].failed]
    if not sound:
        return {"type": "", "why": "No file passes its gates."}
    near = [(f, r) for f, r in sound if r.mean_kl <= CLOSE] or sound
    best = max((r.task_score for _, r in near if r.task_score is not None), default=0.0)

    def as_good(result: Result) -> bool:
        chance = (2 * best * (1 - best) / result.task_count) ** 0.5 if result.task_count else 0.0
        return result.task_score is None or result.task_score >= best - max(FEW, chance)

    file, result = min(((f, r) for f, r in near if as_good(r)), key=lambda pair: pair[0].bytes)
    why = f"the smallest file with a mean KL of at most {CLOSE} nats a token (or of all, where none has)"
    if best > 0:
        score = f"{display.percent(result.task_score, 0)} of {result.task_count} questions"
        why += f" and a task score ({score}) that chance could bring down from the best ({display.percent(best, 0)})"
    return {"type": file.type, "why": f"{why}; {display.size(file.bytes)}, mean KL {result.mean_kl:.3g}"}


def table(
    files: Sequence[Quantised], results: Sequence[Result], merge_check: dict[str, float], text: str
) -> display.Html:
    """What was measured, a row a file; under it what the merge itself cost, and the recommendation."""
    sizes = {f.type: f for f in files}
    rows = [
        {
            "file": r.type,
            "size": display.size(sizes[r.type].bytes) if r.type in sizes else "not kept",
            "bits/weight": f"{sizes[r.type].bits_per_weight:.2f}" if r.type in sizes else "16",
            "token ids": "differ" if "token ids" in r.failed else f"{r.token_texts} texts equal",
            "prompts": "differ" if "prompt" in r.failed else f"{len(r.prompt_shapes)} equal",
            "mean KL": f"{r.mean_kl:.2g}",
            "99 % KL": f"{r.p99_kl:.2g}",
            "of it weights": "" if r.weights_kl is None else f"{r.weights_kl:.2g}",
            "same top-1": display.percent(r.top1),
            "perplexity": f"{r.perplexity:.2f} ({r.reference_perplexity:.2f})",
            "answers equal": f"{r.same_answers} of {r.answers}",
            "stopped": f"{r.stopped} of {r.answers}",
            "task score": "" if r.task_score is None else display.percent(r.task_score, 0),
            "gates": "FAILED: " + ", ".join(r.failed) if r.failed else "passed",
        }
        for r in results
    ]
    shown, best = display.shown([list(r.values()) for r in rows], list(rows[0])), recommend(files, results)
    said = [f"Compared on {text}."]
    if merge_check:
        said.append(
            f"Adapter and base against the merged model: mean KL {merge_check['mean_kl']:.2g}, same top-1 token "
            f"{display.percent(merge_check['top1'])} over {merge_check['tokens']} tokens."
        )
    said.append(f"Recommended: {best['type']}, {best['why']}." if best["type"] else best["why"])
    below = " ".join(said)
    return display.Html(f"{shown.markup}<p><b>{display.escape(below)}</b></p>", f"{shown.text}\n{below}")


def figure(files: Sequence[Quantised], results: Sequence[Result]) -> Any:
    """Size against divergence and, where it was measured, against the task score with its Wilson interval."""
    from scipy.stats import binomtest

    sizes, points = {f.type: f.bytes for f in files}, []
    for r in [r for r in results if r.type in sizes]:
        score = None
        if r.task_score is not None:
            low, high = binomtest(round(r.task_score * r.task_count), r.task_count).proportion_ci(method="wilson")
            score = (r.task_score, float(low), float(high))
        allowed = TYPES[r.type].kl
        points.append(plots.FilePoint(r.type, sizes[r.type], r.mean_kl, r.weights_kl, allowed, score))
    return plots.file_sizes(points, max((r.task_count for r in results), default=0))
