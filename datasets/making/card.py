"""The data card and dataset_info.json."""

from pathlib import Path

COLUMNS = {"prompt": "question", "response": "sql", "system": "system"}
INFO = {
    "atlas_train": {"file_name": "atlas_train.jsonl", "columns": COLUMNS},
    "atlas_test": {"file_name": "atlas_test.jsonl", "columns": COLUMNS},
    "atlas_preference": {
        "file_name": "atlas_preference.jsonl", "ranking": True,
        "columns": {"prompt": "question", "system": "system", "chosen": "chosen", "rejected": "rejected"},
    },
    "general_text": {"file_name": "general_text.jsonl", "columns": {"prompt": "text"}},
}


def render(train: list[dict], test: list[dict], pairs: list[dict], here: Path) -> str:
    return f"# Atlas\n\n{len(train)} training, {len(test)} test, {len(pairs)} preference rows\n"
