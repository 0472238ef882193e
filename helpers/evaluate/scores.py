"""The two files evaluation leaves behind, and a check that they keep their shape.

The report, the model card and the notebook read these files and nothing else, so a number has one source.
Unknown or undefined values are null, never NaN. All text is as the model wrote it: whoever draws it escapes it.

scores.json (one object)
    schema_version    2
    run               name of the run
    headline          plain sentence: the best tuned candidate against the base
    ship              null or {"name": candidate, "sentence": why this file is the one to ship}
    warnings          [sentence, …]; shown first: skipped candidates, small samples, contamination, a failed verdict
    task              {"kind": "text_to_sql" | "references" | "none", "metric": "accuracy", "label": "execution accuracy",
                       "n": items, "n_nonempty": items whose gold answer has rows or null, "seeds": [int, …],
                       "decoding": {"max_new_tokens": int, "temperature": float, …}, "template_hash": str or null,
                       "data": file the items come from, "data_sha256": str, "database": str or null}
    candidates        [candidate, …] in the order judged; the first one scored is the baseline
        name          "base", "sft", "orpo", "merged", "gguf q4_k_m", or what the user called it; unique
        role          "base" | "sft" | "orpo" | "merged" | "gguf" | "other"
        kind          "hf" | "gguf" | "endpoint"
        source        path inside the run, model id or URL (no secrets)
        status        "scored" | "skipped"
        reason        why it was skipped, else ""
        size_bytes    bytes on disk of what a user must hold to run it (an adapter counts with its base) or null
        scores        {metric name: score, …}; empty when skipped
            score     {"value": float or null, "low": float or null, "high": float or null, "n": int,
                       "method": "wilson" | "bootstrap" | "cluster" | "none", "unit": "share" | "points" | "nats" | …}
            text_to_sql metrics: accuracy, accuracy_nonempty, accuracy_clean (items without contamination), valid
                       (the query runs), structural (sqlglot), stopped (ended its turn by itself)
            references metrics: accuracy (the chosen headline metric), exact, f1, rouge_l, chrf, stopped
            whenever measured: harness/<task>/<metric>, preference/accuracy, preference/log_odds, preference/win_rate,
                       instructions/<check>, general_loss, refusal_rate, manners
        groups        {column: {value: {"value": share right, "n": int}}}, for columns "kind" and "origin" of the data
        errors        {error kind: count}; kinds in ERROR_KINDS
        speed         {"seconds": float, "items_per_s": float, "tokens": int, "from_cache": int} ; seconds exclude cached items
    comparisons       [comparison, …]: every candidate against the baseline, and every GGUF against what it was made from
        metric, baseline, candidate, n
        difference, low, high     candidate minus baseline, paired bootstrap 95 % interval, share (0.31 = 31 points)
        wins, losses, ties        items only the candidate / only the baseline got right / both alike
        p, p_holm, test           exact McNemar (right or wrong) or paired bootstrap (scores); Holm over all comparisons
        detectable                smallest difference this sample could show (80 % power, 5 % two-sided)
        verdict                   "better" | "worse" | "no clear difference" | "identical"
        sentence                  "better by 31 points, 95 % interval 24 to 38; n = 180"
    forgetting        null or {"baseline": name, "threshold": {"loss_increase": float (nats per token), "task_drop": float},
                       "candidates": {name: {"loss": float, "perplexity": float, "change": float, "low": float, "high": float,
                       "n": texts, "tokens": int, "bits_per_byte": float, "refusal_rate": float or null,
                       "manners": float or null, "tasks": {task: {"base": float, "value": float}},
                       "passed": bool, "sentence": str}}, "advice": [sentence, …]}
    harness           null or {task: {"n": int, "metrics": {candidate: {metric: {"value": float, "stderr": float or null}}}}}
    preference        null or {candidate: {"accuracy": score, "log_odds": score, "log_odds_chosen": float,
                       "log_odds_rejected": float, "win_rate": score or null, "n": int}}
    instructions      null or {candidate: {check: score}}
    judge             null or {"model": str, "estimate": {...}, "pairs": [{"baseline", "candidate", "n", "win_rate", "low",
                       "high", "length_controlled": float or null, "order_agreement": float, "failed": int}]}
    contamination     null or {"n": int, "contaminated": int, "threshold": float, "ngram": 8, "reference": str,
                       "ids": [id, …], "candidates": {name: {"clean": score, "contaminated": score}}}
    seeds             null or {candidate: {seed: {"accuracy": float}, …, "mean": float, "sd": float or null}}

answers.jsonl (one object a line, one line an item, in the data's order)
    id, question, system, reference       strings ("" where absent)
    meta              {"kind": …, "origin": …, …}: the item's other columns
    cluster           database or document the item shares with others, or ""
    nonempty          true | false | null: the gold query returns rows
    contaminated      true | false | null
    gold              null or result: {"columns": [str], "rows": [[cell, …], …] (at most 10), "count": int}
    answers           {candidate: answer}
        text          what the model wrote; sql: the query taken out of it, or null
        score         0 or 1 (text_to_sql), 0..1 (references); null when undefined
        error         kind from ERROR_KINDS or "" when right; detail: one sentence, or ""
        valid, structural, stopped    bool or null; tokens: int
        result        null or result (as gold)
"""

import json

from helpers.errors import TunebookError
from helpers.tasks.text_to_sql import scoring

SCHEMA_VERSION = 2
SCORES, ANSWERS = "scores.json", "answers.jsonl"

ERROR_KINDS = {
    **scoring.ERROR_KINDS,
    "wrong": "differs from the reference",
    "no_answer": "the candidate failed to answer",
}

_CANDIDATE = {"name", "role", "kind", "source", "status", "reason", "size_bytes", "scores", "groups", "errors", "speed"}
_COMPARISON = {
    "metric",
    "baseline",
    "candidate",
    "n",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "test",
    "detectable",
    "verdict",
    "sentence",
}
_TOP = {
    "schema_version",
    "run",
    "headline",
    "ship",
    "warnings",
    "task",
    "candidates",
    "comparisons",
    "forgetting",
    "harness",
    "preference",
    "instructions",
    "judge",
    "contamination",
    "seeds",
}
_ANSWER = {"id", "question", "system", "reference", "meta", "cluster", "nonempty", "contaminated", "gold", "answers"}


def check(scores: dict, answers: list[dict]) -> None:
    """Raise TunebookError naming the first place where the two files leave the schema above."""
    _keys("scores.json", scores, _TOP)
    if scores["schema_version"] != SCHEMA_VERSION:
        raise TunebookError(
            f"scores.json has schema version {scores['schema_version']}; this version reads "
            f"{SCHEMA_VERSION}; run 05_evaluation again."
        )
    names = [c.get("name") for c in scores["candidates"]]
    if len(set(names)) != len(names):
        raise TunebookError(f"scores.json names a candidate twice ({names}); names must differ; rename one of them.")
    for candidate in scores["candidates"]:
        _keys(f"candidate {candidate.get('name')!r}", candidate, _CANDIDATE)
    for comparison in scores["comparisons"]:
        _keys("a comparison", comparison, _COMPARISON)
    for row in answers:
        _keys(f"answer {row.get('id')!r}", row, _ANSWER)
        for name, answer in row["answers"].items():
            if answer["error"] and answer["error"] not in ERROR_KINDS:
                raise TunebookError(
                    f"answer {row['id']!r} of {name!r} has the unknown error kind {answer['error']!r}; "
                    f"known are {', '.join(ERROR_KINDS)}."
                )


def read(folder) -> tuple[dict, list[dict]]:
    """scores.json and answers.jsonl of an evaluation folder, checked against the schema."""
    try:
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        answers = [json.loads(line) for line in (folder / ANSWERS).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise TunebookError(f"{folder} holds no readable evaluation ({error}); run 05_evaluation again.") from error
    check(scores, answers)
    return scores, answers


def _keys(what: str, value: dict, wanted: set) -> None:
    missing = wanted - value.keys()
    if missing:
        raise TunebookError(f"{what} lacks {', '.join(sorted(missing))}; run 05_evaluation again.")
