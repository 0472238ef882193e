"""Folders as the hub and the datasets library make them: each file goes to its split, and what is no data is named."""

import json

import pytest

from helpers.data import files, sources
from helpers.data.sources import read
from helpers.data.tables import Rejects
from helpers.errors import TunebookError


def parquet(path, word, rows=2):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{"question": f"{word} {i}", "answer": "a"} for i in range(rows)]), path)


def jsonl(path, word):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"question": word, "answer": "a"}) + "\n")


def asked(reading):
    return sorted(row["messages"][0]["content"] for row in reading.table.rows())


def splits(reading):
    return {(source.file.name, source.split) for source in reading.aside}


def test_a_snapshot_gives_its_train_files_to_training_and_its_test_files_to_test(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation-00000-of-00001"):
        parquet(tmp_path / f"data/{name}.parquet", name, 1)
    for name in ("README.md", "LICENSE", ".gitattributes", "LICENSE.txt"):
        (tmp_path / name).write_text("words about the set " * 30)
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"features": {}}}))
    (tmp_path / "stats.json").write_text(json.dumps([{"question": "no row", "answer": "x"}]))
    found = read(str(tmp_path), Rejects())
    assert asked(found) == ["train-00000-of-00002 0", "train-00001-of-00002 0"]
    assert ("test-00000-of-00001.parquet", "test") in splits(found)
    assert ("validation-00000-of-00001.parquet", "validation") in splits(found)
    left = {name for name, split in splits(found) if split == files.LEFT_OUT}
    assert left == {"README.md", "LICENSE.txt", "dataset_infos.json", "stats.json"}
    assert "validation: not read" in repr(sources.Reading(found.table, found.sources + found.aside).shown())
    assert asked(read(str(tmp_path), Rejects(), split="test")) == ["test-00000-of-00001 0"]
    assert asked(read(f"{tmp_path}/data/*.parquet", Rejects())) == asked(found)


@pytest.mark.parametrize(
    "names, trained",
    [
        (["train.jsonl", "test.jsonl"], ["train"]),
        (["train/a.jsonl", "test/a.jsonl", "val/a.jsonl"], ["train/a"]),
        (["gsm_train.jsonl", "gsm_test.jsonl", "extra.jsonl"], ["extra", "gsm_train"]),
        (["chat.jsonl", "test.jsonl"], ["chat"]),
        (["unit-test-writing.jsonl", "train-schedules-qa.jsonl"], ["train-schedules-qa", "unit-test-writing"]),
        (["a.jsonl", "test_cases.jsonl"], ["a", "test_cases"]),
        (["test.jsonl"], ["test"]),
        (["contest.jsonl", "latest.jsonl"], ["contest", "latest"]),
    ],
)
def test_a_files_name_says_its_split_only_where_it_is_meant_so(tmp_path, names, trained):
    for name in names:
        jsonl(tmp_path / name, name.removesuffix(".jsonl"))
    assert asked(read(str(tmp_path), Rejects())) == trained


@pytest.mark.parametrize(
    "data_files",
    [
        [{"split": "train", "path": "x/part-*"}, {"split": "test", "path": "y/*.jsonl"}],
        {"train": ["x/part-*"], "test": "y/held.jsonl"},
        "x/*",
    ],
)
def test_the_configs_of_a_card_say_which_file_is_of_which_split(tmp_path, data_files):
    import yaml

    jsonl(tmp_path / "x/part-1.jsonl", "one"), jsonl(tmp_path / "y/held.jsonl", "held")
    card = yaml.safe_dump({"license": "mit", "configs": [{"config_name": "default", "data_files": data_files}]})
    (tmp_path / "README.md").write_text(f"---\n{card}---\n# A set\n")
    found = read(str(tmp_path), Rejects())
    assert asked(found) == ["one"] and ("held.jsonl", "test" if data_files != "x/*" else files.LEFT_OUT) in splits(
        found
    )


def test_a_folder_of_several_sets_asks_for_one_of_them(tmp_path):
    configs = "---\nconfigs:\n" + "".join(f"- config_name: {n}\n  data_files: {n}/*.jsonl\n" for n in ("en", "de"))
    (tmp_path / "README.md").write_text(configs + "---\n")
    for name in ("en", "de"):
        jsonl(tmp_path / name / "rows.jsonl", name)
    with pytest.raises(TunebookError, match=r"describes the sets en, de; name the files of one"):
        read(str(tmp_path), Rejects())
    assert asked(read(f"{tmp_path}/en/*", Rejects())) == ["en"]
    for name in ("train_sft", "train_gen", "test_sft"):
        parquet(tmp_path / f"u/data/{name}-00000-of-00001.parquet", name)
    with pytest.raises(TunebookError, match=r"2 sets of training files; name one .*train_sft-\*") as stop:
        read(str(tmp_path / "u"), Rejects())
    advised = str(stop.value).split("dataset: ")[1].rstrip(".").split(" or ")
    assert [asked(read(one, Rejects()))[0] for one in sorted(advised)] == ["train_gen 0", "train_sft 0"]


@pytest.mark.parametrize("head", ["---\n[unclosed\n---\n", "---\nconfigs: 3\n---\n", "---\n- a\n---\n", "---", "\x00"])
def test_a_card_that_says_nothing_readable_is_no_obstacle(tmp_path, head):
    (tmp_path / "README.md").write_text(head)
    jsonl(tmp_path / "train.jsonl", "q")
    assert asked(read(str(tmp_path), Rejects())) == ["q"]


def test_what_save_to_disk_wrote_is_read_with_the_names_of_its_classes(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"question": Value("string"), "answer": ClassLabel(names=["ham", "spam"])})
    made = {
        name: Dataset.from_dict({"question": [name], "answer": [1]}, features=features) for name in ("train", "test")
    }
    DatasetDict(made).save_to_disk(tmp_path / "both")
    made["train"].save_to_disk(tmp_path / "one")
    (tmp_path / "one/cache-0123.arrow").write_bytes(b"scraps")
    made["train"].to_parquet(str(tmp_path / "one.parquet"))
    both, one = (read(str(tmp_path / name), Rejects()) for name in ("both", "one"))
    assert asked(both) == asked(one) == ["train"] and ("data-00000-of-00001.arrow", "test") in splits(both)
    for found in (both, one, read(str(tmp_path / "one.parquet"), Rejects())):
        assert next(found.table.rows())["messages"][1]["content"] == "spam"
    single = next((tmp_path / "one").glob("data-*.arrow"))
    assert asked(read(str(single), Rejects())) == ["train"]


def test_arrow_files_of_both_kinds_are_read_and_damaged_ones_give_the_rows_before(tmp_path):
    import pyarrow as pa

    table = pa.Table.from_pylist([{"question": f"q{i}", "answer": "a"} for i in range(3000)])
    for name, write in (
        ("stream.arrow", pa.ipc.new_stream),
        ("file.arrow", pa.ipc.new_file),
        ("f.feather", pa.ipc.new_file),
    ):
        with write(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
        assert len(read(str(tmp_path / name), Rejects()).table) == 3000
    whole = (tmp_path / "stream.arrow").read_bytes()
    (tmp_path / "stream.arrow").write_bytes(whole[: len(whole) // 2])
    rejects = Rejects(limit=1.0)
    assert len(read(str(tmp_path / "stream.arrow"), rejects).table) == 1000 and rejects.invalid == {"broken arrow": 1}
    hurt = bytearray(whole)
    hurt[600:700] = b"\xff" * 100
    (tmp_path / "hurt.arrow").write_bytes(hurt)
    with pytest.raises(TunebookError, match="broken arrow"):
        read(str(tmp_path / "hurt.arrow"), Rejects())


@pytest.mark.parametrize(
    "content",
    [
        {"features": {"a": {}}, "citation": "", "description": ""},
        {"builder_name": "json", "citation": "", "description": "", "features": None, "splits": {}},
        {"citation": "", "description": "", "features": {}, "homepage": "", "license": ""},
    ],
)
def test_the_datasets_librarys_dataset_info_is_no_obstacle(tmp_path, content):
    jsonl(tmp_path / "rows.jsonl", "q")
    (tmp_path / "dataset_info.json").write_text(json.dumps(content))
    assert asked(read(str(tmp_path / "rows.jsonl"), Rejects())) == asked(read(str(tmp_path), Rejects())) == ["q"]


@pytest.mark.parametrize(
    "entry",
    [
        {"file_name": "/etc/passwd"},
        {"file_name": "../secret.jsonl"},
        {"file_name": "link.jsonl"},
        {"hf_hub_url": "/etc"},
        {"hf_hub_url": "../x"},
        {"hf_hub_url": "owner/name", "folder": "/etc"},
        {"hf_hub_url": "owner/name", "folder": "a/../../x"},
    ],
)
def test_a_described_set_never_leads_out_of_its_folder(tmp_path, entry):
    (tmp_path / "secret.jsonl").write_text('{"question": "q", "answer": "a"}')
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    with pytest.raises(TunebookError, match=r"outside of its folder|an id of the hub and a folder in it"):
        read("rows", Rejects(), info=str(folder))


def test_a_snapshot_in_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    blob = tmp_path / "datasets--a--b/blobs/0123"
    jsonl(blob, "q")
    place = tmp_path / "datasets--a--b/snapshots/main"
    place.mkdir(parents=True)
    (place / "rows.jsonl").symlink_to(blob)
    (place / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", "columns": {
        "prompt": "question", "response": "answer"}}}))  # fmt: skip
    assert asked(read("rows", Rejects(), info=str(place))) == ["q"]
