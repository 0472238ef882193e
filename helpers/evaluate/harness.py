"""Standard tasks by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), offline, for HF weights and GGUF.

HF weights go through the library's own `HFLM`, so scores equal the library's to the last digit. Its `gguf` model is
broken against current llama.cpp servers (issue 4158 there); here a GGUF is scored from llama.cpp's own logits.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import cache
from helpers.errors import TunebookError
from helpers.evaluate.candidates import Session
from helpers.gguf import header
from helpers.gguf.runner import GgufModel
from helpers.model.loading import hub_error

GENERAL_TASK = "general_knowledge"
BATCH, BOOTSTRAP = 16, 1000
LOCAL = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")  # what own tasks consist of


def general_task(questions: Path, folder: Path) -> str:
    """Write the task over JSON lines of `question`, `choices`, `answer` (from 0) into `folder`; returns its name."""
    task = Path(__file__).with_name(f"{GENERAL_TASK}.yaml").read_text()
    task = task.replace("QUESTIONS", json.dumps(str(Path(questions).resolve())))
    cache.write_atomic(folder / f"{GENERAL_TASK}.yaml", f"{task}# questions: {cache.content_hash(questions)}\n")
    return GENERAL_TASK


def run(
    session: Session, tasks: Sequence[str], include: Path | None = None, limit: int = 0, seed: int = 17
) -> dict[str, Any]:
    """{task: {"n": items, "metrics": {metric: {"value", "stderr"}}}}, of the general task also "right", 0 or 1 for each
    item; kept in the cache by the tasks' content. Raises TunebookError for a task that neither the library nor
    `include` has, and for data that is not on this machine."""
    content = cache.content_hash(include, LOCAL) if include else ""
    key = cache.key("harness items", importlib.metadata.version("lm-eval"), list(tasks), content, limit, seed)
    if session.store.get(key) is None:
        session.store.put(key, evaluate(session.reader, tasks, include, limit, seed))
    return session.store.get(key)


def evaluate(reader: Any, tasks: Sequence[str], include: Path | None, limit: int, seed: int) -> dict[str, Any]:
    """The library's `evaluate` on a loaded candidate, reduced to values, standard errors and counts. `simple_evaluate`
    would also ask git and pip about this machine, which prints errors outside of a checkout."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import set_seed

    os.environ.setdefault("HF_DATASETS_OFFLINE", "1" if os.environ.get("HF_HUB_OFFLINE") == "1" else "0")
    manager = known(tasks, include)
    if isinstance(reader, GgufModel):
        model = _runtime_model(reader)
    else:
        model = HFLM(pretrained=reader.model, tokenizer=reader.tokenizer, batch_size=BATCH)
    set_seed(seed)
    # The small default task is done in seconds; the library's bars would fill the notebook. Longer tasks show them.
    small = list(tasks) == [GENERAL_TASK]
    bars = contextlib.redirect_stderr(io.StringIO()) if small else contextlib.nullcontext()
    try:
        with bars:
            loaded = manager.load(list(tasks))
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=seed)
            how = {"bootstrap_iters": BOOTSTRAP, "log_samples": small, "verbosity": "ERROR"}
            found = lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit or None, **how)
    except (ConnectionError, FileNotFoundError) as error:
        raise hub_error(error, f"the data of {', '.join(tasks)}") from error
    except RuntimeError as error:
        raise TunebookError(f"{', '.join(tasks)} could not be run ({str(error).strip()[:200]}).") from error
    counts = {task: int(sizes["effective"]) for task, sizes in found["n-samples"].items()}
    made = {t: {"n": counts.get(t, 0), "metrics": _metrics(values)} for t, values in found["results"].items()}
    if small:
        each = sorted(found["samples"][GENERAL_TASK], key=lambda one: one["doc_id"])
        made[GENERAL_TASK]["right"] = [one["acc"] for one in each]
    return made


def known(tasks: Sequence[str], include: Path | None) -> Any:
    """The library's index of tasks; its own thousands of files are read only when a task is not among `include`'s.
    Raises TunebookError for a task that it does not know."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = str(include) if include else None
    for defaults in [False, True] if include else [True]:
        manager = TaskManager(verbosity="ERROR", include_path=path, include_defaults=defaults)
        if not (unknown := [t for t in tasks if t not in manager.all_tasks]):
            return manager
    raise TunebookError(
        f"harness_tasks: lm-eval knows no task {unknown[0]!r}; name one of its own or a YAML in harness_include."
    )


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The library's flat "acc,none", "acc_stderr,none" as nested numbers."""
    found = {}
    for metric, filtered in (name.split(",", 1) for name in values if "," in name and "_stderr," not in name):
        value, error = (values.get(f"{metric}{kind},{filtered}") for kind in ("", "_stderr"))
        if isinstance(value, (int, float)):
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            found[label] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return found


def _runtime_model(reader: GgufModel) -> Any:
    from lm_eval.api.model import TemplateLM

    class RuntimeLM(TemplateLM):
        """lm-eval's interface over llama.cpp's logits (token ids, batch of one)."""

        tokenizer_name = reader.path.name
        eot_token_id = reader.ends()[0]
        prefix_token_id = header.check(reader.path).metadata.get("tokenizer.ggml.bos_token_id", eot_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """With the model's BOS where it has one, once, as HFLM encodes."""
            ids = reader.tokenize(string, add_special_tokens is not False)
            return ids[1:] if ids[:2] == [reader.bos, reader.bos] else ids

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            scored = reader.score([(context, continuation) for _, context, continuation in requests])
            return [(sum(values), greedy) for values, greedy in scored]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            texts = [([self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
            return [sum(values) for values in reader.logprobs(texts)]

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            found = []
            for text, how in (request.args for request in requests):
                until = how.get("until") or []
                warmth = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
                stops = [until] if isinstance(until, str) else list(until)
                ids, most = self.tok_encode(text), int(how.get("max_gen_toks", 256))
                reader.ask("generate", [ids], most, warmth, 17, stops, on_event=lambda made: found.append(made[1]))
            return found

    return RuntimeLM()
