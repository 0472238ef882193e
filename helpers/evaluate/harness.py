"""Standard tasks by lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): offline, for HF weights and for GGUF.

HF weights go through the library's own `HFLM`, so scores equal the library's to the last digit. Its `gguf` model is broken
against current llama.cpp servers (issue 4158 there), and `gguf_file=` scores dequantised weights in torch; here a GGUF is
scored from the logits of the llama.cpp runtime itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError

GENERAL_TASK = "general_knowledge"


def general_task(questions: Path, folder: Path) -> str:
    """Write the YAML of a multiple-choice task over JSON lines of `question`, `choices`, `answer` (index from 0); returns its name."""
    import yaml

    from helpers.runs import write_atomic

    task = {
        "task": GENERAL_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(questions).resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metadata": {"version": 1.0},
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    write_atomic(folder / f"{GENERAL_TASK}.yaml", yaml.safe_dump(task, sort_keys=False))
    return GENERAL_TASK


def run(
    session: Any, tasks: Sequence[str], include: Path | None = None, limit: int = 0, seed: int = 17
) -> dict[str, Any]:
    """{task: {"n": items, "metrics": {metric: {"value", "stderr"}}}} of one candidate; kept in the cache by the tasks' content.

    tasks: names the library knows or YAML files in `include`. Offline, tasks over local files only. Raises TunebookError for an
    unknown task, for data that is not on this machine, and for an endpoint, which gives no probabilities.
    """
    if session.candidate.kind == "endpoint":
        raise TunebookError(
            "Harness tasks need probabilities of given answers, which an OpenAI-compatible endpoint does not give; "
            "name the weights or the GGUF file."
        )
    from importlib.metadata import version

    key = ["harness", version("lm-eval"), list(tasks), _fingerprint(include, tasks), limit, seed]
    return session.kept(key, lambda reader: evaluate(language_model(reader), tasks, include, limit, seed))


def evaluate(model: Any, tasks: Sequence[str], include: Path | None, limit: int, seed: int) -> dict[str, Any]:
    """The library's `simple_evaluate` on a ready lm-eval model, reduced to values, standard errors and counts."""
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tuple(tasks), include)
    # The small default task is done in seconds; the library's bars would fill the notebook. Longer tasks show them.
    bars = contextlib.redirect_stderr(io.StringIO()) if list(tasks) == [GENERAL_TASK] else contextlib.nullcontext()
    try:
        with bars:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit or None,
                bootstrap_iters=1000,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                verbosity="ERROR",
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise TunebookError(
            f"The data of {', '.join(tasks)} is not on this machine and no hub is reachable ({str(error)[:160]}); "
            "use tasks over local files."
        ) from error
    return {
        task: {"n": int(found["n-samples"].get(task, {}).get("effective", 0)), "metrics": _metrics(values)}
        for task, values in found["results"].items()
    }


def _manager(tasks: tuple[str, ...], include: Path | None) -> Any:
    """The library's index of tasks; its own thousands of files are read only when a task is not among `include`'s."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(verbosity="ERROR", include_path=str(include), include_defaults=False) if include else None
    if manager is None or any(t not in manager.all_tasks for t in tasks):
        manager = TaskManager(verbosity="ERROR", include_path=str(include) if include else None)
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise TunebookError(
            f"lm-eval knows no task {unknown[0]!r}; name one of its tasks or a YAML task in harness_include."
        )
    return manager


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The library's flat "acc,none", "acc_stderr,none" as nested numbers."""
    found = {}
    for name, value in values.items():
        metric, comma, filtered = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        found[label] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return found


def language_model(reader: Any) -> Any:
    """An lm-eval model around a loaded candidate."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1" if os.environ.get("HF_HUB_OFFLINE") == "1" else "0")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if getattr(reader, "is_runtime", False):
        return _runtime_model(reader)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=reader.model, tokenizer=reader.tokenizer, batch_size=16)


def _runtime_model(reader: Any) -> Any:
    from lm_eval.api.model import TemplateLM

    ends = reader.ends()

    class RuntimeLM(TemplateLM):
        """lm-eval's interface over llama.cpp's logits (token ids, batch of one)."""

        @property
        def tokenizer_name(self) -> str:
            return reader.path.name

        @property
        def eot_token_id(self) -> int:
            return ends[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return reader.tokenize(string, bool(add_special_tokens))

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            scored = reader.score([(context, continuation) for _, context, continuation in requests])
            return [(sum(values), greedy) for values, greedy in scored]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            rows = [self.tok_encode(r.args[0]) for r in requests]
            return [sum(values) for values, _ in reader.score([([self.eot_token_id], ids) for ids in rows])]

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            found = []
            for request in requests:
                text, options = request.args
                until = options.get("until") or []
                made = reader.continue_text(
                    text,
                    int(options.get("max_gen_toks", 256)),
                    [until] if isinstance(until, str) else list(until),
                    float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                )
                found.append(made)
            return found

    return RuntimeLM()


def _fingerprint(include: Path | None, tasks: Sequence[str]) -> str:
    """Hash of the local YAML files and of the data files beside or named in them."""
    import yaml

    digest = hashlib.sha256(json.dumps(list(tasks)).encode())
    for file in sorted(Path(include).rglob("*.y*ml")) if include else []:
        digest.update(file.read_bytes())
        try:
            named = yaml.safe_load(file.read_text()).get("dataset_kwargs", {}).get("data_files", [])
        except (yaml.YAMLError, AttributeError):
            continue  # a YAML with the library's own tags: its text is in the hash already
        for path in named.values() if isinstance(named, dict) else [named] if isinstance(named, str) else named:
            if Path(str(path)).is_file():
                digest.update(Path(str(path)).read_bytes())
    return digest.hexdigest()
