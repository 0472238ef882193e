"""Runs for the report's tests: made with the real run folders, tokenizer and questions; only the models' answers are drawn by lot."""

import json
import random
from pathlib import Path

from helpers import params, runs

PROJECT = Path(__file__).parents[1]
NASTY = "</pre><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">\x00\x1b[31m\u202e&amp; {{ x }}\ud800"


def full_run(name="atlas", seed=0, tokenizer=None, model_path="", lift=0.45, **changed):
    """A run with all five stages finished. lift: how much more often the tuned candidates are right."""
    rng = random.Random(seed)
    model = {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "path": str(model_path), "revision": "r1", "origin": "hub"}

    def opened(stage):
        own = {n.split(".")[1]: v for n, v in changed.items() if n.startswith(stage + ".")}
        return runs.open_stage(stage, params.resolve(stage, {"run": name, **own}))

    stage = opened("data")
    _data(stage, tokenizer, model)
    for key in ("sft", "orpo"):
        stage = opened(key)
        _training(stage, key, rng)
    stage = opened("gguf")
    _export(stage, rng)
    stage = opened("eval")
    scores, answers = evaluation(rng, lift, name)
    write_evaluation(stage.path, scores, answers)
    best = scores["candidates"][1]
    stage.finish({"candidates": {best["name"]: {"accuracy": best["scores"]["accuracy"]["value"]}}, "comparisons": []})
    return runs.root() / name


def _data(stage, tokenizer, model):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (PROJECT / "datasets" / "atlas_train.jsonl").read_text().splitlines()[:300]]
    ids, masks = [], []
    for row in rows:
        chat = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        whole = prompt + tokenizer(row["sql"] + "<|im_end|>").input_ids
        ids.append(whole)
        masks.append([0] * len(prompt) + [1] * (len(whole) - len(prompt)))
    pq.write_table(
        pa.table(
            {"input_ids": pa.array(ids, pa.list_(pa.int32())), "completion_mask": pa.array(masks, pa.list_(pa.int8()))}
        ),
        stage.path / "train.parquet",
    )
    total, trained = sum(map(len, ids)), sum(map(sum, masks))
    stage.finish(
        {
            "rows": {"train": 300, "eval": 30, "test": 180},
            "preference_rows": {"train": 300, "eval": 40},
            "tokens": total,
            "trained_tokens": trained,
            "trained_share": trained / total,
            "steps": [
                {"step": "unicode", "seen": 980, "kept": 980, "changed": 4, "dropped": {}},
                {
                    "step": "near duplicates",
                    "seen": 980,
                    "kept": 952,
                    "changed": 0,
                    "dropped": {"same as an earlier row": 28},
                },
            ],
            "rejected": {"invalid": {"no answer": 3}, "removed": {"same as an earlier row": 28}},
        },
        template_hash="ab" * 32,
        tokenizer_hash="cd" * 32,
        model=model,
    )


def _training(stage, key, rng):
    lines = []
    for step in range(1, 121):
        row = {
            "step": step,
            "loss": 1.9 * 0.97**step + 0.15 + rng.random() * 0.05,
            "learning_rate": 1e-3 * (1 - step / 120),
            "grad_norm": 0.4 + rng.random(),
            "tokens_per_second": 300 + rng.random() * 20,
        }
        if key == "orpo":
            row |= {
                "log_odds_chosen": 0.02 * step + rng.random() * 0.1,
                "rewards/accuracies": min(0.5 + step / 200, 1.0),
            }
        if step % 30 == 0:
            row["eval_loss"] = row["loss"] + 0.05
        lines.append(json.dumps(row))
    (stage.path / "log.jsonl").write_text("\n".join(lines) + "\n")
    plan = {
        "backend": "hf",
        "attention": "sdpa",
        "quantize": "nf4",
        "row_tokens": 512,
        "errors": {"peak_gib": 0.04},
        "reason": "no GPU here",
    }
    stage.finish(
        {"last_loss": 0.19, "steps": 120, "peak_gib": 2.31},
        extra={"plan": plan, "notes": ["rank 16 on 7 linear layers"]},
    )


def _export(stage, rng):
    files, sizes = [], []
    for kind, size, kl in (("f16", 271_000_000, 6e-6), ("q8_0", 144_800_000, 0.0047), ("q4_k_m", 105_400_000, 0.0644)):
        (stage.path / f"model-{kind}.gguf").write_bytes(b"GGUF" + rng.randbytes(64))
        sizes.append({"type": kind, "bytes": size, "bits_per_weight": size * 8 / 134.5e6})
        files.append(
            {
                "type": kind,
                "mean_kl": kl,
                "weights_kl": kl * 0.8,
                "p99_kl": kl * 12,
                "top1": 1 - kl * 2,
                "perplexity": 3.2 + kl,
                "failed": {},
            }
        )
    runs.write_json(stage.path / "fidelity.json", {"merge": {}, "budgets": {}, "files": files, "sizes": sizes})
    stage.finish({"recommended": {"type": "q8_0", "why": "half the size, no measurable loss"}})


def _score(values, unit="share"):
    mean = sum(values) / len(values)
    half = 1.96 * (max(mean * (1 - mean), 0.001) / len(values)) ** 0.5
    return {
        "value": mean,
        "low": max(mean - half, 0.0),
        "high": min(mean + half, 1.0),
        "n": len(values),
        "method": "wilson",
        "unit": unit,
    }


def evaluation(rng, lift=0.45, run="atlas"):
    """scores.json and answers.jsonl that agree with each other and with the schema."""
    rows = [json.loads(line) for line in (PROJECT / "datasets" / "atlas_test.jsonl").read_text().splitlines()[:180]]
    chances = {
        "base": 0.12,
        "sft": 0.12 + lift,
        "orpo": 0.15 + lift,
        "merged": 0.15 + lift,
        "gguf q8_0": 0.14 + lift,
        "gguf q4_k_m": 0.1 + lift,
    }
    kinds = ["wrong_values", "unknown_column", "syntax", "wrong_count"]
    answers = []
    for i, row in enumerate(rows):
        given = {}
        for name, chance in chances.items():
            right = rng.random() < chance
            error = "" if right else rng.choice(kinds)
            given[name] = {
                "text": row["sql"] if right else row["sql"].replace("name", "nam3"),
                "sql": row["sql"],
                "score": int(right),
                "error": error,
                "detail": "" if right else "no such column: nam3",
                "valid": right or error.startswith("wrong"),
                "structural": right,
                "stopped": True,
                "tokens": 24,
                "result": {"columns": ["n"], "rows": [["Baikal"], [None]], "count": 2},
            }
        answers.append(
            {
                "id": f"t{i:04}",
                "question": row["question"],
                "system": row["system"],
                "reference": row["sql"],
                "meta": {"kind": row["kind"], "origin": row["origin"]},
                "cluster": "atlas",
                "nonempty": i % 9 > 0,
                "contaminated": i < 2,
                "gold": {"columns": ["n"], "rows": [["Baikal"]], "count": 1},
                "answers": given,
            }
        )
    candidates = [
        {
            "name": n,
            "role": "gguf" if "gguf" in n else n,
            "kind": "gguf" if "gguf" in n else "hf",
            "source": n,
            "status": "scored",
            "reason": "",
            "size_bytes": {"gguf q8_0": 144_800_000, "gguf q4_k_m": 105_400_000}.get(n, 269_000_000),
            "scores": {
                "accuracy": _score([a["answers"][n]["score"] for a in answers]),
                "valid": _score([a["answers"][n]["valid"] for a in answers]),
                "stopped": _score([1] * 180),
            },
            "groups": {c: _grouped(answers, n, c) for c in ("kind", "origin")},
            "errors": {k: sum(a["answers"][n]["error"] == k for a in answers) for k in kinds},
            "speed": {"seconds": 30.0, "items_per_s": 6.0, "tokens": 4300, "from_cache": 0},
        }
        for n in chances
    ]
    candidates.append(
        {
            "name": "gguf q2_k",
            "role": "gguf",
            "kind": "gguf",
            "source": "x",
            "status": "skipped",
            "reason": "the file is truncated",
            "size_bytes": None,
            "scores": {},
            "groups": {},
            "errors": {},
            "speed": {"seconds": 0.0, "items_per_s": 0.0, "tokens": 0, "from_cache": 0},
        }
    )
    base = candidates[0]["scores"]["accuracy"]["value"]
    comparisons = [_compared("base", c, base) for c in candidates[1:-1]]
    best = candidates[4]
    sentence = comparisons[3]["sentence"]
    return {
        "schema_version": 2,
        "run": run,
        "headline": f"The tuned model is {sentence}",
        "ship": {
            "name": best["name"],
            "sentence": "gguf q8_0 is the smallest file whose score cannot be told from the merged model's.",
        },
        "warnings": ["2 test items share 8-grams with the training data; they are scored apart."],
        "task": {
            "kind": "text_to_sql",
            "metric": "accuracy",
            "label": "execution accuracy",
            "n": 180,
            "n_nonempty": 160,
            "seeds": [17],
            "decoding": {"max_new_tokens": 128, "temperature": 0.0},
            "template_hash": "ab" * 32,
            "data": "01_data_prep/test.parquet",
            "data_sha256": "ef" * 32,
            "database": "database.sqlite",
        },
        "candidates": candidates,
        "comparisons": comparisons,
        "forgetting": {
            "baseline": "base",
            "threshold": {"loss_increase": 0.1, "task_drop": 0.03},
            "advice": ["Mix 5 % of general rows into the training data."],
            "candidates": {
                "base": _lost(3.02, 0.0, True),
                "sft": _lost(3.17, 0.15, False),
                "orpo": _lost(3.05, 0.03, True),
            },
        },
        "harness": {
            "capitals": {
                "n": 24,
                "metrics": {
                    "base": {"acc": {"value": 0.708, "stderr": 0.095}},
                    "sft": {"acc": {"value": 0.667, "stderr": 0.098}},
                },
            }
        },
        "preference": {"base": _preferred(0.55), "orpo": _preferred(0.93)},
        "instructions": {"base": {"json": _score([1, 0, 1, 0])}, "orpo": {"json": _score([1, 1, 1, 0])}},
        "judge": None,
        "contamination": {
            "n": 180,
            "contaminated": 2,
            "threshold": 0.5,
            "ngram": 8,
            "reference": "01_data_prep/train.parquet",
            "ids": ["t0000", "t0001"],
            "candidates": {"sft": {"clean": _score([1, 0]), "contaminated": _score([1, 1])}},
        },
        "seeds": {"sft": {"17": {"accuracy": 0.57}, "18": {"accuracy": 0.59}, "mean": 0.58, "sd": 0.014}},
    }, answers


def _grouped(answers, name, column):
    values = {}
    for a in answers:
        values.setdefault(a["meta"][column], []).append(a["answers"][name]["score"])
    return {v: {"value": sum(s) / len(s), "n": len(s)} for v, s in values.items()}


def _compared(baseline, candidate, base):
    difference = candidate["scores"]["accuracy"]["value"] - base
    verdict = "better" if difference > 0.1 else "worse" if difference < -0.1 else "no clear difference"
    return {
        "metric": "accuracy",
        "baseline": baseline,
        "candidate": candidate["name"],
        "n": 180,
        "difference": difference,
        "low": difference - 0.08,
        "high": difference + 0.08,
        "wins": 90,
        "losses": 9,
        "ties": 81,
        "p": 1e-9,
        "p_holm": 1e-8,
        "test": "exact McNemar",
        "detectable": 0.11,
        "verdict": verdict,
        "sentence": f"{verdict} by {abs(100 * difference):.0f} points, "
        f"95 % interval {100 * difference - 8:.0f} to {100 * difference + 8:.0f}; n = 180",
    }


def _lost(loss, change, passed):
    return {
        "loss": loss,
        "perplexity": 2.718**loss,
        "change": change,
        "low": change - 0.01,
        "high": change + 0.01,
        "n": 60,
        "tokens": 9000,
        "bits_per_byte": 1.1,
        "refusal_rate": 0.5,
        "manners": 0.9,
        "tasks": {},
        "passed": passed,
        "sentence": f"Loss on general text changed by {change:+.2f} nats: {'within' if passed else 'beyond'} the threshold.",
    }


def _preferred(share):
    return {
        "accuracy": _score([1] * round(share * 40) + [0] * (40 - round(share * 40))),
        "log_odds": {"value": share, "low": None, "high": None, "n": 40, "method": "none", "unit": "nats"},
        "log_odds_chosen": 0.5,
        "log_odds_rejected": 0.1,
        "win_rate": None,
        "n": 40,
    }


def write_evaluation(folder, scores, answers):
    runs.write_json(folder / "scores.json", scores)
    runs.write_atomic(folder / "answers.jsonl", "".join(json.dumps(a) + "\n" for a in answers))
