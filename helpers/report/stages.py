"""What was done: data and masks, training curves and memory, every parameter, versions, hashes and the command to do it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from helpers import params as parameters
from helpers import runs
from helpers.report import facts as reading
from helpers.report import svg
from helpers.report.facts import TITLES, Facts
from helpers.report.markup import Markup, duration, esc, percent, plain, section, size, table

#: metrics of a training log worth a plot: (title, y label, {key: name}, logarithmic)
CURVES = [
    ("Loss", "nats per token", {"loss": "training", "eval_loss": "held out"}, False),
    ("Learning rate", "", {"learning_rate": "learning rate"}, False),
    ("Gradient norm", "", {"grad_norm": "gradient norm"}, True),
    ("Memory", "GiB", {"memory_gib": "highest so far"}, False),
    ("Speed", "tokens a second", {"tokens_per_second": "training", "tokens_per_s": "training"}, False),
    (
        "Log-odds of chosen over rejected",
        "nats",
        {
            "log_odds_chosen": "training",
            "log_odds": "training",
            "eval_log_odds_chosen": "held out",
            "eval_log_odds": "held out",
        },
        False,
    ),
    (
        "Preference margin",
        "",
        {
            "rewards/margins": "training",
            "margins": "training",
            "eval_rewards/margins": "held out",
            "eval_margins": "held out",
        },
        False,
    ),
    (
        "Prefers the chosen answer",
        "share of pairs",
        {
            "rewards/accuracies": "training",
            "accuracy": "training",
            "eval_rewards/accuracies": "held out",
            "eval_accuracy": "held out",
        },
        False,
    ),
    ("Negative log-likelihood", "nats per token", {"nll_loss": "training", "eval_nll_loss": "held out"}, False),
]


def data(facts: Facts) -> Markup:
    """Rows in and out, why rows went, lengths, and real rows with the trained tokens marked."""
    if "data" not in facts.stages:
        return Markup("")
    metrics = facts.metrics("data")
    body = ""
    splits = {
        **_mapping(metrics.get("rows")),
        **{f"preference {k}": v for k, v in _mapping(metrics.get("preference_rows")).items()},
    }
    order = ["train", "eval", "test", "preference train", "preference eval"]
    rows = [
        (n, f"{splits[n]:,}")
        for n in sorted(splits, key=lambda n: order.index(n) if n in order else 9)
        if isinstance(splits[n], int)
    ]
    body += table(["split", "rows"], rows, ["name", "n"])
    if svg.finite(metrics.get("trained_share")):
        body += (
            f"<p>{plain(metrics.get('tokens'))} tokens; {percent(metrics['trained_share'])} of them are trained on.</p>"
        )
    steps = [s for s in metrics.get("steps") or [] if isinstance(s, Mapping)]
    shown = [
        [
            s.get("step"),
            plain(s.get("seen")),
            plain(s.get("kept")),
            plain(s.get("changed")) if s.get("changed") else "",
            ", ".join(f"{k}: {v}" for k, v in _mapping(s.get("dropped")).items()),
        ]
        for s in steps
    ]
    body += (
        "<h3>Cleaning</h3>"
        + table(["step", "rows in", "rows out", "changed", "removed"], shown, ["name", "n", "n", "n", "wide"])
        if shown
        else ""
    )
    rejected = _mapping(metrics.get("rejected"))
    wrong = {k: v for part in ("invalid", "removed") for k, v in _mapping(rejected.get(part)).items()}
    if wrong:
        body += "<h3>Rows left out, by reason</h3>" + table(
            ["reason", "rows"], sorted(wrong.items(), key=lambda kv: -kv[1]), ["wide", "n"]
        )
    body += f'<div class="plots">{_lengths(facts)}</div>'
    if examples := reading.examples(facts):
        body += "<h3>What the model sees</h3><p class='sub'>The first training rows, decoded from the token ids of train.parquet. Marked: trained on.</p>"
        for pieces in examples:
            text = "".join(
                f"<mark>{esc(t)}</mark>" if trained else str(esc(t))
                for t, trained in ((t[:2500], m) for t, m in pieces)
            )
            body += f'<pre class="tokens">{text}</pre>'
    return section("data", "Data", body, str(facts.stages["data"].params.get("dataset", "")))


def _lengths(facts: Facts) -> str:
    found = reading.lengths(facts)
    if not found:
        return ""
    bins = 32
    top = max(found)
    step = max(-(-top // bins), 1)
    counts = [0] * (top // step + 1)
    for length in found:
        counts[length // step] += 1
    limit = facts.stages["data"].params.get("max_length")
    near = limit if svg.finite(limit) and limit <= 1.6 * top else None
    return svg.histogram(
        [i * step for i in range(len(counts) + 1)], counts, "Length of the training rows", "tokens", near, "max_length"
    )


def training(facts: Facts) -> Markup:
    """Curves of both training stages and memory against the plan."""
    body = ""
    for stage in ("sft", "orpo"):
        if stage not in facts.stages:
            continue
        log, metrics, manifest = facts.logs.get(stage, []), facts.metrics(stage), facts.stages[stage].data
        figures = "".join(_curve(log, *curve) for curve in CURVES)
        body += (
            f"<h3>{TITLES[stage]}</h3><div class='plots'>{figures}</div>" + _memory(metrics, manifest) + _how(manifest)
        )
        flat = [
            (k, plain(v))
            for k, v in sorted(metrics.items())
            if isinstance(v, (int, float, str, bool)) and len(str(v)) < 200
        ]
        body += (
            f"<details><summary>All figures of this stage</summary>{table(['', ''], flat, ['', 'n'])}</details>"
            if flat
            else ""
        )
    return section("training", "Training", body)


def _curve(log: list[dict[str, Any]], title: str, label: str, keys: dict[str, str], log_y: bool) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(log):
        step = row.get("step", number)
        for key, name in keys.items():
            if key in row and isinstance(step, (int, float)):
                value = row[key]
                series.setdefault(name, []).append((step, value if isinstance(value, (int, float)) else float("nan")))
    if title == "Learning rate" and len(series.get("learning rate", [])) < 3:
        return ""
    return svg.lines(
        series,
        title,
        "step",
        label,
        log_y=log_y and all(y > 0 for points in series.values() for _, y in points if svg.finite(y)),
    )


def _memory(metrics: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Planned against used memory. The plan keeps its error as (predicted - measured) / measured."""
    plan = _mapping(manifest.get("plan"))
    used = next((v for v in (metrics.get("peak_gib"), manifest.get("peak_memory_gib")) if svg.finite(v)), None)
    if used is None:
        return ""
    error = _mapping(plan.get("errors")).get("peak_gib")
    planned = used * (1 + error) if svg.finite(error) else plan.get("peak_gib")
    if not svg.finite(planned):
        return f"<p>Highest memory: {used:.2f} GiB.</p>"
    top = max(planned, used) * 1.1
    rows = [
        ["planned", Markup(svg.interval(planned, None, None, 0, top)), f"{planned:.2f} GiB"],
        [
            "used",
            Markup(svg.interval(used, None, None, 0, top)),
            f"{used:.2f} GiB, {100 * (used / planned - 1):+.0f} % against the plan",
        ],
    ]
    return table(["memory", "", ""], rows, ["name", "bar", "wide"])


def _how(manifest: dict[str, Any]) -> str:
    """The setting that the planner chose, why, and what the job noted about itself."""
    plan = _mapping(manifest.get("plan"))
    named = ("backend", "attention", "quantize", "row_tokens", "accumulation", "recompute")
    chosen = [f"{name.replace('_', ' ')} {plain(plan[name])}" for name in named if name in plan]
    notes = [", ".join(chosen), plan.get("reason"), *(n for n in manifest.get("notes") or [] if isinstance(n, str))]
    return "".join(f'<p class="sub">{esc(n)}</p>' for n in notes if n)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


# ---------------------------------------------------------------- how it was made


def provenance(facts: Facts) -> Markup:
    """The command that does it again, every parameter, versions, hashes and files."""
    if not facts.stages:
        return Markup("")
    body = "<h3>Do it again</h3>" + f"<pre>{esc(command(facts))}</pre>"
    body += f"<details class='noprint'><summary>params.yaml</summary><pre>{esc(params_yaml(facts))}</pre></details>"
    for stage, manifest in facts.stages.items():
        changed, rows = set(), []
        for name, value in manifest.params.items():
            known = next((p for p in parameters.STAGES[stage] if p.name == name), None)
            if known is not None and value != known.default and name != "run":
                changed.add(len(rows))
            rows.append(
                [name, plain(value) if value != "" else "–", known.unit if known else "", known.help if known else ""]
            )
        names = [("changed" if i in changed else "") for i in range(len(rows))]
        body += (
            f"<details><summary>{TITLES[stage]}: {len(rows)} parameters, {len(changed)} changed</summary>"
            + table(["parameter", "value", "unit", "meaning"], rows, ["name", "", "", "wide"], names)
            + "</details>"
        )
    body += _identity(facts) + _files(facts)
    return section("made", "How it was made", body)


def command(facts: Facts) -> str:
    """Shell lines that repeat this run: the code's revision, then every stage with the parameters of params.yaml."""
    revision = str((facts.last.data.get("code_revision") if facts.last else "") or "")
    lines = (
        [
            f"git checkout {shlex.quote(revision.removesuffix('+changes'))}"
            + ("   # the run had uncommitted changes on top" if revision.endswith("+changes") else "")
        ]
        if revision
        else []
    )
    last = list(facts.stages)[-1]
    until = f" --to {runs.FOLDERS[last][:2]}" if last != "eval" else ""
    return "\n".join(
        [
            *lines,
            f"bash ci/run.sh --run {shlex.quote(facts.run)}-again --params {shlex.quote(f'runs/{facts.run}/params.yaml')}{until}",
        ]
    )


def params_yaml(facts: Facts) -> str:
    """Every parameter of every stage, as ci/run.sh takes them with --params."""
    import yaml

    sections = {stage: {n: v for n, v in m.params.items() if n != "run"} for stage, m in facts.stages.items()}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _identity(facts: Facts) -> str:
    model = facts.model
    rows = [
        ("model", f"{model.get('name')} ({model.get('origin')})" if model else ""),
        ("model revision", model.get("revision", "")),
        ("code", (facts.last.data.get("code_revision") or "") if facts.last else ""),
    ]
    for key, title in (("template_hash", "chat template sha256"), ("tokenizer_hash", "tokenizer sha256")):
        rows.append((title, next((m.data[key] for m in facts.stages.values() if m.data.get(key)), "")))
    data_hash = next((m.data["data_hash"] for m in facts.stages.values() if m.data.get("data_hash")), "")
    rows.append(("data sha256", data_hash if isinstance(data_hash, str) else json.dumps(data_hash)))
    rows.append(("GPU", next((m.data["gpu"] for m in facts.stages.values() if m.data.get("gpu")), "none")))
    rows.append(
        (
            "versions",
            ", ".join(f"{k} {v}" for k, v in ((facts.last.data.get("versions") or {}) if facts.last else {}).items()),
        )
    )
    return "<h3>Model, code and versions</h3>" + table(
        ["", ""], [(k, Markup(f"<code>{esc(v)}</code>")) for k, v in rows if v], ["name", "wide"]
    )


def _files(facts: Facts) -> str:
    stages = [
        [
            TITLES[s],
            m.data.get("finished_at", ""),
            duration(m.data.get("wall_s")),
            f"{m.data.get('peak_memory_gib') or 0:.2f}",
            Markup(f"<code>{m.sha256[:16] if (m.path / 'manifest.json').is_file() else ''}</code>"),
        ]
        for s, m in facts.stages.items()
    ]
    body = "<h3>Stages</h3>" + table(
        ["stage", "finished", "time", "memory, GiB", "manifest sha256"], stages, ["name", "", "n", "n", ""]
    )
    files = [
        [
            f"{m.path.name}/{name}",
            size(known.get("bytes")),
            Markup(f"<code>{esc(str(known.get('sha256', ''))[:16])}</code>"),
        ]
        for m in facts.stages.values()
        for name, known in m.data.get("artifacts", {}).items()
    ]
    shown = table(["file", "size", "sha256"], files[:400], ["", "n", ""])
    return body + (
        f"<details class='noprint'><summary>{len(files)} files and their hashes</summary>{shown}</details>"
        if files
        else ""
    )
