"""Is it better, by how much, how sure is that, and what to ship: paired statistics on the same items, and the verdict.

Two candidates answer the same questions, so their scores are compared item by item; an unpaired test throws that away
(at 220 items a difference with p = 0.008 in McNemar's exact test has p = 0.08 in an unpaired one).

The verdict's words and numbers are made here once: notebook, terminal, report, model card and metrics.json print them.
Which file to ship is a test of non-inferiority: the smallest one whose paired 95 % interval against the best candidate
of this run stays above -margin, else the best file. The best of several is so partly by luck, so this asks more of a
smaller file than a comparison with the trained model would. A file that is not better than the base is never shipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from helpers import display

RESAMPLES = 10_000
LEVEL = 0.95
Z_LEVEL = 1.959964  # normal quantile of 5 % two-sided
POWER_FACTOR = Z_LEVEL + 0.841621  # standard errors between 0 and an effect seen with 80 % power
Values = Sequence[float | bool | None]
Clusters = Sequence[str] | None
Record = dict[str, Any]
Compare = Callable[[str, str], Record | None]


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); honest at 0 and at 1, where the textbook's interval has no width."""
    from scipy.stats import binomtest

    found = binomtest(right, n).proportion_ci(LEVEL, "wilson")
    return float(found.low), float(found.high)


def share(values: Values, unit: str = "share", clusters: Clusters = None, seed: int = 17) -> dict[str, Any]:
    """A score of scores.json: the mean of the defined values and its 95 % interval, Wilson's for right or wrong values,
    a bootstrap interval for others and for those in clusters."""
    kept = [i for i, v in enumerate(values) if v is not None and math.isfinite(v)]
    if not kept:
        return {"value": None, "low": None, "high": None, "n": 0, "unit": unit}
    known = np.array([values[i] for i in kept], float)
    groups = [clusters[i] for i in kept] if clusters is not None and len(set(clusters)) > 1 else None
    if groups is None and unit == "share" and np.isin(known, (0, 1)).all():
        low, high = wilson(int(known.sum()), len(known))
    else:
        low, high = middle(bootstrap(known, seed, clusters=groups))
    return {"value": float(known.mean()), "low": low, "high": high, "n": len(known), "unit": unit}


def bootstrap(
    values: Any, seed: int = 17, resamples: int = RESAMPLES, clusters: Clusters = None, sizes: Any = None
) -> np.ndarray:
    """Means of `resamples` resamples of values (items,): items drawn with replacement, or whole clusters of them; sizes
    (items,): what the sum is divided by instead of the number of items."""
    sums = np.asarray(values, np.float64)
    sizes = np.ones(len(sums)) if sizes is None else sizes
    if clusters is not None:
        _, owner = np.unique(np.asarray(clusters), return_inverse=True)
        sums, sizes = np.bincount(owner, sums), np.bincount(owner, sizes)
    rng, found = np.random.default_rng(seed), []
    for count in [100] * (resamples // 100):  # a few MB of indices at a time
        index = rng.integers(0, len(sums), (count, len(sums)))
        found.append(sums[index].sum(1) / sizes[index].sum(1))
    return np.concatenate(found)


def perplexity(texts: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """A score of scores.json from each text's (nats, tokens): e to the nats a token; texts are resampled."""
    nats, tokens = np.array(texts, float).T
    low, high = middle(bootstrap(nats, sizes=tokens))
    value, low, high = (math.exp(min(x, 50)) for x in (float(nats.sum() / tokens.sum()), low, high))
    return {"value": value, "low": low, "high": high, "n": len(texts), "unit": "perplexity"}


def middle(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): valid under any dependence, never weaker than Bonferroni."""
    order = np.argsort(values)
    adjusted = np.maximum.accumulate(np.array(values)[order] * np.arange(len(values), 0, -1)).clip(max=1.0)
    return adjusted[np.argsort(order)].tolist()


def standard_error(values: Any, clusters: Clusters = None) -> float:
    """Standard error of the mean; with clusters the sandwich estimate (Miller 2024, arXiv:2411.00640)."""
    x = np.asarray(values, float)
    owner = np.arange(len(x)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    totals = np.bincount(owner, x - x.mean())
    n = len(totals)
    return math.sqrt((totals**2).sum() * n / (n - 1)) / len(x) if n > 1 else math.inf


def detectable(differences: Any, clusters: Clusters = None) -> float:
    """Smallest true difference that this many items would show with 80 % power at 5 %, given how much the two disagree;
    where they never disagree, as if one item in them did."""
    x = np.array(differences, float)
    if not x.any():
        x[0] = 1.0
    return min(1.0, POWER_FACTOR * standard_error(x, clusters))


def paired_interval(wins: int, losses: int, n: int) -> tuple[float, float]:
    """95 % interval of a paired difference of shares: the adjusted Wald interval of Bonett and Price (2012, J. Educ.
    Behav. Stat. 37:479). With few disagreements a bootstrap interval is too short, with no losses it ends at 0."""
    up, down = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = Z_LEVEL * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(up - down - half, -1.0), min(up - down + half, 1.0)


def pair(
    baseline: str, candidate: str, a: Values, b: Values, clusters: Clusters = None, seed: int = 17
) -> dict[str, Any] | None:
    """One comparison of scores.json: candidate b minus baseline a, on the items that both have a score for, if any."""
    from scipy.stats import binomtest

    both = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x is not None and y is not None]
    if not both:
        return None
    x, y = (np.array([s[i] for i in both], float) for s in (a, b))
    names = [clusters[i] for i in both] if clusters is not None else []
    groups = names if 1 < len(set(names)) < len(names) else None
    difference = y - x
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    low, high, p, test = 0.0, 0.0, 1.0, "identical"
    if wins + losses and groups is None and np.isin([x, y], (0.0, 1.0)).all():
        low, high = paired_interval(wins, losses, len(both))
        p, test = float(binomtest(wins, wins + losses).pvalue), "exact McNemar"
    elif wins + losses:
        draws = bootstrap(difference, seed, clusters=groups)
        low, high = middle(draws)
        tail = max(min((draws <= 0).mean(), (draws >= 0).mean()), 1 / len(draws))
        p, test = min(1.0, 2 * float(tail)), "paired bootstrap" + (" by cluster" if groups else "")
    found = {"baseline": baseline, "candidate": candidate, "n": len(both), "test": test}
    found |= {"difference": float(difference.mean()), "low": low, "high": high, "p": p}
    found |= {"wins": wins, "losses": losses, "ties": len(both) - wins - losses}
    return {**found, "detectable": detectable(difference, groups)}


def settle(comparisons: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Correct all p-values together (p_holm) and put each result into words (verdict, sentence)."""
    known = [c for c in comparisons if c]
    for one, p in zip(known, holm([c["p"] for c in known]), strict=True):
        verdict = "identical" if one["wins"] + one["losses"] == 0 else "no clear difference"
        if p < 1 - LEVEL and (one["low"] > 0 or one["high"] < 0):
            verdict = "better" if one["low"] > 0 else "worse"
        one |= {"p_holm": p, "verdict": verdict, "sentence": _sentence(one, verdict)}
    return known


def points(share: float) -> str:
    """A share as percentage points, one decimal where it is small."""
    return f"{100 * share:.0f}" if abs(share) >= 0.02 else f"{100 * share:.1f}".removesuffix(".0").replace("-0", "0")


def span(low: float, high: float, less: str = "worse", more: str = "better") -> str:
    """An interval of a difference in words: "7 worse to 0.7 better"."""
    if low * high > 0:
        return f"{' to '.join(points(v) for v in sorted((abs(low), abs(high))))} {more if low > 0 else less}"
    return f"{points(-low)} {less} to {points(high)} {more}"


def bounds(one: dict[str, Any]) -> tuple[float, float]:
    """What fits a comparison: its interval; items that are all alike may still hide a difference of `detectable`."""
    alike = one["wins"] + one["losses"] == 0
    return (-one["detectable"], one["detectable"]) if alike else (one["low"], one["high"])


def _sentence(one: dict[str, Any], verdict: str) -> str:
    """ "better by 31 points, 95 % interval 24 to 38; n = 180"; without a clear difference, all that fits."""
    n, shown = one["n"], points(one["detectable"])
    if verdict == "identical":
        return f"identical on every item; n = {n}, a true difference under {shown} points could hide here"
    if verdict == "no clear difference":
        fits = span(one["low"], one["high"])
        return (
            f"no clear difference ({100 * one['difference']:+.1f} points, anything from {fits} fits; n = {n}; this "
            f"sample shows differences from {shown} points)"
        )
    low, high = sorted((abs(one["low"]), abs(one["high"])))
    size = points(abs(one["difference"]))
    return f"{verdict} by {size} points, 95 % interval {points(low)} to {points(high)}; n = {n}"


def sentences(scores: Record) -> list[str]:
    """What there is to say, of scores.json or metrics.json: how good it is, what to ship, what was forgotten."""
    parts = (scores.get("headline"), *((scores.get(key) or {}).get("sentence") for key in ("ship", "lost")))
    return [part for part in parts if part]


def verdict(scores: Record, pair: Compare, margin: float) -> Record:
    """scores.json's `headline`, `ship` and `lost`. pair: the comparison of the second candidate with the first."""
    ship = _ship(scores, pair, margin)
    named = protagonist({**scores, "ship": ship})
    return {"headline": headline(scores, named), "ship": ship, "lost": _lost(scores["forgetting"], named)}


def value(candidate: Record | None) -> float:
    """A candidate's accuracy; -1 where it has none."""
    found = ((candidate or {}).get("scores") or {}).get("accuracy", {}).get("value")
    return found if display.finite(found) else -1.0


def protagonist(scores: Record) -> Record | None:
    """The candidate that the run is about: the one to ship, else the most accurate of its own, of others, the base."""
    ready = [c for c in scores.get("candidates", []) if c["status"] == "scored"]
    ship, place = (scores.get("ship") or {}).get("name"), {"base": 0, "other": 1}
    return max(ready, key=lambda c: (c["name"] == ship, place.get(c["role"], 2), _rank(c)), default=None)


def headline(scores: Record, candidate: Record | None) -> str:
    """How good a candidate is and how it compares with the baseline."""
    task = scores["task"]
    if task["kind"] == "none":
        return "The test items have no references, so nothing was scored; read the answers side by side."
    if candidate is None or value(candidate) < 0:
        return "Nothing was scored."
    perplexity = "perplexity" in candidate["scores"]
    said = f"{candidate['name']} scores {_short(candidate)} {task['label']}"
    if perplexity:
        said = f"{candidate['name']} has {_short(candidate)} on held-out text"
    if one := next((c for c in scores["comparisons"] if c["candidate"] == candidate["name"]), None):
        base = next((c for c in scores["candidates"] if c["name"] == one["baseline"]), None)
        return (
            f"{said}, {one['baseline']} {_short(base)}: {task['label'] + ' ' if perplexity else ''}{one['sentence']}."
        )
    alone = "; nothing else was judged to compare it with" * (len(scores["candidates"]) == 1)
    return f"{said} on {task['n']} questions{alone}."


def _ship(scores: Record, pair: Compare, margin: float) -> Record | None:
    """name: the file to ship, "" for none; sentence: why; against, margin: the candidate and the bound of its test."""
    ready = [c for c in scores["candidates"] if value(c) >= 0]
    own = [c for c in ready if c["role"] not in ("base", "other")]
    if not own:
        return None
    exports = [c for c in own if c["role"] in ("gguf", "merged")]
    files, best = exports or own, max(own, key=_rank)
    base = next((c["name"] for c in ready if c["role"] == "base"), None)
    better = {c["candidate"] for c in scores["comparisons"] if (c["baseline"], c["verdict"]) == (base, "better")}
    if base is None or base != ready[0]["name"]:  # it was not what the others were compared with
        again = settle([pair(base, c["name"]) for c in own] if base else [])
        better = {c["candidate"] for c in again if c["verdict"] == "better"} if base else {c["name"] for c in own}
    good = sorted((c for c in files if c["name"] in better), key=_size)
    found = {"against": best["name"], "margin": margin, "name": ""}
    if not good:
        said = (
            f"Nothing to ship yet: no {'export' if exports else 'trained model'} is better than {base} beyond chance."
        )
        larger = f" {best['name']} is: export it in a larger type (quantizations in notebook 04)."
        return {**found, "sentence": said + larger * (best["name"] in better)}
    compared = {c["name"]: pair(best["name"], c["name"]) for c in good if c is not best}
    kept = {name for name, one in compared.items() if one and bounds(one)[0] > -margin} | {best["name"]}
    chosen = next((c for c in good if c["name"] in kept), max(good, key=_rank))
    held = f", {display.size(_size(chosen))}" if _size(chosen) else ""
    said = f"Ship {chosen['name']} ({chosen['source']}{held}): {_short(chosen)}, "
    if one := compared.get(chosen["name"]):
        how = "the smallest file that stays" if chosen["name"] in kept else "the best file; none is shown to stay"
        against = f"{best['name']}, {_short(best)} (anything from {span(*bounds(one))} fits)"
        said += f"{how} within {points(margin)} points of {against}"
    else:
        said += "and no candidate of this run scores higher"
    if smaller := [c for c in files if _size(c) < _size(chosen)]:
        other = max(smaller, key=_rank)
        saved = _size(chosen) - _size(other)
        share_saved = display.percent(saved / _size(chosen), 0)
        said += f"; {other['name']} would save {display.size(saved)} ({share_saved})"
        if one := pair(chosen["name"], other["name"]):
            cost = (
                f"probably cost {points(-one['difference'])} points" if one["difference"] < 0 else "cost nothing here"
            )
            said += f" and {cost} (anything from {span(*bounds(one), 'lost', 'gained')} fits)"
    said += "; no base was judged, so nothing says that training helped" * (base is None)
    return {**found, "name": chosen["name"], "sentence": said + "."}


def _lost(forgetting: Record | None, candidate: Record | None) -> Record | None:
    """What the candidate forgot, measured on it or on what it was made from. passed: no threshold was crossed."""
    measured, who = (forgetting or {}).get("candidates") or {}, (candidate or {}).get("name", "")
    for name in (who, (candidate or {}).get("made_from", "")):
        if forgetting and name in measured and name != forgetting["baseline"]:
            named = name if name == who else f"{name}, which {who} was made from,"
            said = f"{named} {measured[name]['sentence']}."
            return {"name": name, "passed": measured[name]["passed"], "sentence": said}
    return None


def _size(candidate: Record) -> int:
    return candidate["size_bytes"] or 0


def _rank(candidate: Record) -> tuple[float, int]:
    return value(candidate), -_size(candidate)


def _short(candidate: Record | None) -> str:
    """Its score in its own unit."""
    perplexity = ((candidate or {}).get("scores") or {}).get("perplexity")
    return f"perplexity {display.number(perplexity['value'])}" if perplexity else display.percent(value(candidate), 0)
