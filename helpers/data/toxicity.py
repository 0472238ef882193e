"""Toxicity through a scorer of the user's choice. None is shipped: a word list does not score, and a model is a choice.

scorer = "transformers:unitary/toxic-bert"       a local classifier, by folder or hub id; "…#toxic" picks its label
         "house"                                 a function registered as SCORERS["house"] = score
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from helpers.data.tables import StepReport
from helpers.data.turns import Row, spoken
from helpers.errors import TunebookError
from helpers.llm_client import shown_url

Scorer = Callable[[list[str]], list[float]]  # texts → a number from 0 to 1 for each
SCORERS: dict[str, Scorer] = {}
HARMLESS = ("non-toxic", "nontoxic", "not toxic", "neutral", "safe", "non-hate", "nothate", "not_toxic", "label_0")
MAX_CHARS = 4_000  # a scorer sees the start of longer texts


def drop_toxic(
    rows: Iterable[list[Row]], report: StepReport, scorer: str | Scorer, threshold: float = 0.5
) -> Iterator[list[Row]]:
    """Drop rows whose conversation (without system prompt) scores at least `threshold`, 0 to 1.

    Raises TunebookError for a scorer that cannot be loaded, and for one
    that does not give every text a number from 0 to 1.
    """
    score = load_scorer(scorer) if isinstance(scorer, str) else scorer
    report.figures |= {"threshold": threshold, "highest_score": 0.0}

    def judge(batch: list[Row]) -> Iterator[tuple[str, str] | None]:
        found = score(["\n".join(spoken(row))[:MAX_CHARS] for row in batch])
        for row, value in zip(batch, [*found, *[None] * (len(batch) - len(found))], strict=False):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                why = f"The toxicity scorer gave {value!r} for row {row['row']} of {row['file']}"
                raise TunebookError(f"{why}; it must give one number from 0 to 1 for each text. Choose another.")
            report.figures["highest_score"] = max(report.figures["highest_score"], round(float(value), 3))
            yield ("toxic", f"score {value:.2f}, threshold {threshold:g}") if value >= threshold else None

    return report.sift(rows, judge)


def load_scorer(name: str) -> Scorer:
    """The function behind a scorer's name."""
    if name in SCORERS:
        return SCORERS[name]
    kind, _, place = name.partition(":")
    if kind == "transformers":
        return _classifier(place)
    known = ", ".join(SCORERS) or "there is none"
    raise TunebookError(f"toxicity is {shown_url(name)!r}; it takes transformers:model or a registered name ({known}).")


def _classifier(name: str) -> Scorer:
    from transformers import pipeline

    name, _, label = name.partition("#")
    try:
        classify = pipeline("text-classification", name, model_kwargs={"use_safetensors": True}, device="cpu")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        found = f"The toxicity classifier {name!r} could not be loaded ({reason})"
        raise TunebookError(f"{found}; name a local folder or a hub id.") from error
    config = classify.model.config
    labels = list(config.id2label.values())
    wanted = {have for have in labels if (have == label if label else have.lower() not in HARMLESS)}
    several = config.problem_type == "multi_label_classification"
    if not wanted or (len(wanted) == len(labels) > 1 and not several):
        found = f"It is not clear which label of {name!r} means toxic"
        raise TunebookError(f"{found}; name one of {', '.join(labels)} as 'transformers:{name}#label'.")
    longest = min(classify.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512) - 2, 512)

    def score(texts: list[str]) -> list[float]:
        found = classify(texts, top_k=None, batch_size=32, truncation=True, max_length=longest)
        marks = [[one["score"] for one in every if one["label"] in wanted] for every in found]
        return [max(one) if several else min(sum(one), 1.0) for one in marks]

    return score
