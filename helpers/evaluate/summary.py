"""From what was measured to scores.json: scores with intervals, comparisons, verdicts, and the sentences people read."""

from __future__ import annotations

from collections import Counter
from typing import Any

from helpers.evaluate import forgetting, harness, preferences, statistics
from helpers.tasks import instructions, questions
from helpers.tasks.text_metrics import METRICS as METRIC_LABELS

SMALL = 100  # items; below this even a large difference may hide


def build(judged: Any) -> dict[str, Any]:
    """scores.json of an `Evaluation` that has measured."""
    scored = {c.name: c for c in judged.candidates if c.name in judged.answers}
    pairs = {n: dict(p) for n, p in judged.preferences.items()}
    baseline = next(iter(scored))
    if pairs:
        preferences.win_rates(pairs, baseline)
    metas, golds = [i.meta for i in judged.items], [i.reference for i in judged.items]
    followed = {
        n: {
            check: statistics.share(passed)
            for check, passed in instructions.score(judged.answers[n], metas, golds, judged.kind).items()
        }
        for n in scored
    }
    forgot = _forgetting(judged, baseline)
    harnessed = _harness(judged)
    records = [_candidate(judged, c, pairs, followed, harnessed, forgot) for c in judged.candidates]
    comparisons = _comparisons(judged, scored, baseline)
    contaminated = _contamination(judged, scored)
    scores = {
        "schema_version": 2,
        "run": judged.params.run,
        "headline": "",
        "ship": None,
        "warnings": [],
        "task": _task(judged),
        "candidates": records,
        "comparisons": comparisons,
        "forgetting": forgot,
        "harness": harnessed,
        "preference": pairs or None,
        "instructions": followed,
        "judge": judged.judgements,
        "contamination": contaminated,
        "seeds": _seeds(judged),
    }
    scores["headline"] = _headline(scores, judged)
    scores["ship"] = _ship(scores, judged)
    scores["warnings"] = _warnings(scores, judged)
    return scores


def metrics(scores: dict[str, Any]) -> dict[str, Any]:
    """metrics.json: the table of candidates and the comparisons."""
    table = {}
    for c in scores["candidates"]:
        if c["status"] == "scored":
            accuracy = c["scores"].get("accuracy") or {}
            table[c["name"]] = {
                "accuracy": accuracy.get("value"),
                "low": accuracy.get("low"),
                "high": accuracy.get("high"),
                "valid": (c["scores"].get("valid") or {}).get("value"),
                "n": accuracy.get("n", 0),
                "size_bytes": c["size_bytes"],
            }
    return {
        "candidates": table,
        "comparisons": scores["comparisons"],
        "headline": scores["headline"],
        "ship": scores["ship"],
        "skipped": {c["name"]: c["reason"] for c in scores["candidates"] if c["status"] == "skipped"},
    }


def _task(judged: Any) -> dict[str, Any]:
    p, data = judged.params, judged.stage.parents["data"]
    label = {
        "text_to_sql": "execution accuracy" if judged.database else "execution agreement on synthetic databases",
        "references": METRIC_LABELS[p.reference_metric],
        "none": "not scored",
    }[judged.kind]
    nonempty = [judged.nonempty(i) for i in judged.items]
    return {
        "kind": judged.kind,
        "metric": "accuracy",
        "label": label,
        "n": len(judged.items),
        "n_nonempty": sum(bool(x) for x in nonempty) if judged.kind == "text_to_sql" else None,
        "seeds": judged.seeds,
        "decoding": {"max_new_tokens": p.max_new_tokens, "temperature": p.temperature},
        "template_hash": judged.template_hash,
        "data": f"{data.path.name}/test.parquet",
        "data_sha256": data.data["artifacts"].get("test.parquet", {}).get("sha256", ""),
        "database": f"{data.path.name}/{judged.database.name}" if judged.database else None,
        "resampling_seed": p.seed,
    }


def _candidate(
    judged: Any, c: Any, pairs: dict, followed: dict, harnessed: dict | None, forgot: dict | None
) -> dict[str, Any]:
    record = {
        "name": c.name,
        "role": c.role,
        "kind": c.kind,
        "source": c.source,
        "status": "scored",
        "reason": "",
        "size_bytes": c.size_bytes,
        "scores": {},
        "groups": {},
        "errors": {},
        "speed": judged.speed.get(c.name, {}),
    }
    if c.name not in judged.answers:
        return {**record, "status": "skipped", "reason": judged.skipped.get(c.name, c.trouble or "not measured")}
    entries = judged.answers[c.name]
    values = [e["score"] for e in entries]
    found = {"accuracy": _score(judged, values)}
    if judged.kind == "text_to_sql":
        found["accuracy_nonempty"] = _score(
            judged, [v if judged.nonempty(i) else None for v, i in zip(values, judged.items, strict=True)]
        )
        found["valid"] = statistics.share([e["valid"] for e in entries])
        found["structural"] = statistics.share([e["structural"] for e in entries])
    elif judged.kind == "references":
        found |= {m: _score(judged, [e["metrics"][m] for e in entries]) for m in METRIC_LABELS}
    if judged.contamination and judged.contamination["contaminated"]:
        found["accuracy_clean"] = _score(
            judged, [None if h else v for v, h in zip(values, judged.contaminated, strict=True)]
        )
    found["stopped"] = statistics.share([e["stopped"] for e in entries])
    found |= {f"instructions/{name}": s for name, s in followed[c.name].items()}
    for task, result in (harnessed or {}).items():
        for metric, v in result["metrics"].get(c.name, {}).items():
            half = 1.96 * (v["stderr"] or 0)
            low, high = (v["value"] - half, v["value"] + half) if half else (None, None)
            found[f"harness/{task}/{metric}"] = {
                "value": v["value"],
                "low": low,
                "high": high,
                "n": result["n"],
                "method": "none",
                "unit": "share",
            }
    if c.name in pairs:
        found |= {f"preference/{k}": pairs[c.name][k] for k in ("accuracy", "log_odds", "win_rate") if pairs[c.name][k]}
    if forgot and c.name in forgot["candidates"]:
        f = forgot["candidates"][c.name]
        found["general_loss"] = {
            "value": f["loss"],
            "low": None,
            "high": None,
            "n": f["n"],
            "method": "none",
            "unit": "nats",
        }
        found |= {
            k: {
                "value": f[k],
                "low": None,
                "high": None,
                "n": len(judged.chats[c.name]["examples"]),
                "method": "none",
                "unit": "share",
            }
            for k in ("refusal_rate", "manners")
            if f[k] is not None
        }
    errors = Counter(e["error"] for e in entries if e["error"])
    record.update(scores=found, groups=questions.groups(judged.items, values), errors=dict(errors.most_common()))
    return record


def _score(judged: Any, values: list[float | None]) -> dict[str, Any]:
    binary = all(v in (0, 1, None) for v in values)
    return (
        statistics.share(values)
        if binary and not judged.clusters
        else statistics.mean(values, clusters=judged.clusters, seed=judged.params.seed)
    )


def _comparisons(judged: Any, scored: dict[str, Any], baseline: str) -> list[dict[str, Any]]:
    """Every candidate against the baseline, and against what it was exported from or trained on top of."""
    pairs = [(baseline, name) for name in scored if name != baseline]
    pairs += [(c.made_from, c.name) for c in scored.values() if c.made_from in scored and c.made_from != baseline]
    pairs += [("sft", "orpo")] if {"sft", "orpo"} <= scored.keys() and baseline != "sft" else []
    values = {n: [e["score"] for e in judged.answers[n]] for n in scored}
    found = [
        statistics.pair(a, b, values[a], values[b], "accuracy", judged.clusters, judged.params.seed)
        for a, b in dict.fromkeys(pairs)
    ]
    return statistics.settle([f for f in found if f])


def _forgetting(judged: Any, baseline: str) -> dict[str, Any] | None:
    if baseline not in judged.losses:
        return None
    tasks = {
        n: {forgetting.TASK: t[harness.GENERAL_TASK]["metrics"]["acc"]["value"]}
        for n, t in judged.tasks.items()
        if harness.GENERAL_TASK in t
    }
    parents = judged.stage.parents
    last = parents.get("orpo") or parents.get("sft")
    replay = parents["data"].params.get("replay_share")
    return forgetting.judge(
        baseline,
        judged.losses,
        judged.chats,
        tasks,
        judged.params.loss_increase,
        judged.params.task_drop,
        last.params.get("rank") if last else None,
        replay,
    )


def _harness(judged: Any) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for name, tasks in judged.tasks.items():
        for task, result in tasks.items():
            found.setdefault(task, {"n": result["n"], "metrics": {}})["metrics"][name] = result["metrics"]
    return found or None


def _contamination(judged: Any, scored: dict[str, Any]) -> dict[str, Any] | None:
    if judged.contamination is None:
        return None
    apart = {}
    for name in scored:
        values = [e["score"] for e in judged.answers[name]]
        apart[name] = {
            side: _score(
                judged,
                [
                    v if h == (side == "contaminated") else None
                    for v, h in zip(values, judged.contaminated, strict=True)
                ],
            )
            for side in ("clean", "contaminated")
        }
    return {**judged.contamination, "candidates": apart}


def _seeds(judged: Any) -> dict[str, Any] | None:
    if len(judged.seeds) < 2:
        return None
    found = {}
    for name, by_seed in judged.by_seed.items():
        known = [v for v in by_seed.values() if v is not None]
        centre = sum(known) / len(known) if known else None
        spread = (sum((v - centre) ** 2 for v in known) / (len(known) - 1)) ** 0.5 if len(known) > 1 else None
        found[name] = {**{s: {"accuracy": v} for s, v in by_seed.items()}, "mean": centre, "sd": spread}
    return found


def _value(record: dict[str, Any]) -> float:
    value = record["scores"].get("accuracy", {}).get("value") if record["status"] == "scored" else None
    return -1.0 if value is None else value


def _headline(scores: dict[str, Any], judged: Any) -> str:
    tuned = [c for c in scores["candidates"] if c["status"] == "scored" and c["role"] != "base" and _value(c) >= 0]
    if judged.kind == "none":
        return "The test items have no references, so nothing was scored; read the answers side by side."
    if not tuned:
        first = next((c for c in scores["candidates"] if c["status"] == "scored"), None)
        if first is None:
            return "Nothing was scored."
        return f"{first['name']} scores {100 * _value(first):.0f} % {scores['task']['label']} on {scores['task']['n']} questions."
    best = max(tuned, key=_value)
    against = next((c for c in scores["comparisons"] if c["candidate"] == best["name"]), None)
    text = f"{best['name']} scores {100 * _value(best):.0f} % {scores['task']['label']}"
    return (
        f"{text}; against {against['baseline']}: {against['sentence']}."
        if against
        else f"{text} on {scores['task']['n']} questions."
    )


def _ship(scores: dict[str, Any], judged: Any) -> dict[str, str] | None:
    """The smallest export that is not worse than the best candidate beyond chance (paired, 95 % interval), if it beats the base."""
    ready = [c for c in scores["candidates"] if c["status"] == "scored" and _value(c) >= 0]
    files = [c for c in ready if c["role"] in ("gguf", "merged")] or [c for c in ready if c["role"] in ("sft", "orpo")]
    if not files:
        return None
    best = max(ready, key=_value)
    top = [e["score"] for e in judged.answers[best["name"]]]
    beats = {
        c["candidate"] for c in scores["comparisons"] if c["verdict"] == "better" and c["baseline"] == ready[0]["name"]
    }
    for record in sorted(files, key=lambda c: c["size_bytes"] or 0):
        pair = statistics.pair(
            best["name"],
            record["name"],
            top,
            [e["score"] for e in judged.answers[record["name"]]],
            "accuracy",
            judged.clusters,
            judged.params.seed,
        )
        close = record is best or pair is None or pair["high"] >= 0
        if close and record["name"] in beats:
            less = "" if record is best else f", within chance of the best ({best['name']}, {100 * _value(best):.0f} %)"
            size = f"{record['size_bytes'] / 2**20:.0f} MiB, " if record["size_bytes"] else ""
            return {
                "name": record["name"],
                "sentence": f"Ship {record['name']} ({record['source']}): {size}{100 * _value(record):.0f} % "
                f"{scores['task']['label']}{less}.",
            }
    return {"name": "", "sentence": f"Nothing to ship yet: no export is better than {ready[0]['name']} beyond chance."}


def _warnings(scores: dict[str, Any], judged: Any) -> list[str]:
    said = [
        f"{c['name']} was left out: {c['reason']}" for c in scores["candidates"] if c["status"] == "skipped"
    ] + judged.warnings
    broken = sum(1 for i, _ in enumerate(judged.items) if all(e[i]["score"] is None for e in judged.answers.values()))
    if broken and judged.kind != "none":
        said.append(
            f"{broken} of {len(judged.items)} items have a reference that cannot be scored; they are left out of every figure."
        )
    if len(judged.items) < SMALL and judged.kind != "none":
        worst = max((c["detectable"] for c in scores["comparisons"]), default=None)
        said.append(
            f"Only {len(judged.items)} questions"
            + (f": differences under {100 * worst:.0f} points can hide." if worst else ".")
        )
    if scores["contamination"] and scores["contamination"]["contaminated"]:
        said.append(
            f"{scores['contamination']['contaminated']} of {len(judged.items)} questions stand in the training data; accuracy_clean "
            "leaves them out."
        )
    for name, f in (scores["forgetting"] or {}).get("candidates", {}).items():
        if not f["passed"]:
            said.append(f"{name} {f['sentence']}.")
    return said
