"""Every kind of file is read, and what is broken in one is rejected by row, named and counted."""

import gzip
import json
import os

import pytest

from helpers.data import sources
from helpers.data.sources import read
from helpers.data.tables import Rejects, Table
from helpers.data.turns import batches, make_row
from helpers.errors import TunebookError

ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(5)]
WANTED = [(f"question {i}", f"answer {i}") for i in range(5)]


def write_kinds(folder):
    """The same five rows in every kind of file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.json").write_text(json.dumps(ROWS))
    (folder / "c.csv").write_text("instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in ROWS))
    (folder / "d.tsv").write_text(
        "instruction\toutput\n" + "".join(f"{r['instruction']}\t{r['output']}\n" for r in ROWS)
    )
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "e.parquet")
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "g.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "h.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (folder / "i.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    (folder / "j.jsonl").write_bytes(lines.decode().encode("utf-16"))
    (folder / "k.csv.gz").write_bytes(gzip.compress((folder / "c.csv").read_bytes()))


def questions(reading):
    return [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in reading.table.rows()]


def rejected(path, **options):
    rejects = Rejects(limit=1.0)
    reading = read(str(path), rejects, **options)
    return reading, rejects


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "b.json",
        "c.csv",
        "d.tsv",
        "e.parquet",
        "f.jsonl.gz",
        "g.jsonl.zst",
        "h.json",
        "i.jsonl",
        "j.jsonl",
        "k.csv.gz",
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    write_kinds(tmp_path)
    reading, rejects = rejected(tmp_path / name)
    assert questions(reading) == WANTED
    assert not rejects.invalid


def test_folders_globs_and_lists_of_sources_are_read_in_order_and_named_apart(tmp_path):
    write_kinds(tmp_path)
    (tmp_path / ".hidden.jsonl").write_text("not json")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    folder, _ = rejected(tmp_path)
    assert len(folder.table) == 11 * 5
    assert len(rejected(tmp_path / "*.jsonl")[0].table) == 3 * 5
    both, _ = rejected(f"{tmp_path}/a.jsonl, {tmp_path}/a.jsonl")
    assert [report.name for report in both.sources] == ["a", "a-2"]
    assert {row["source"] for row in both.table.rows()} == {"a", "a-2"}


def test_the_id_of_a_row_depends_on_its_content_and_not_on_where_it_stood(tmp_path):
    write_kinds(tmp_path)
    first, second = (list(rejected(tmp_path / name)[0].table.rows()) for name in ("a.jsonl", "e.parquet"))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert first[0]["file"] != second[0]["file"] and first[3]["row"] == 4


def line(text):
    return text if isinstance(text, bytes) else text.encode()


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    "bad, reason",
    [
        ('{"instruction": "a", "output": ', "malformed JSON"),
        (b'{"instruction": "caf\xe9", "output": "b"}', "not UTF-8"),
        ('{"instruction": "a", "instruction": "c", "output": "b"}', "duplicated key"),
        ('{"instruction": "a\\u0000b", "output": "b"}', "NUL byte"),
        (b'{"instruction": "a\x00b", "output": "b"}', "malformed JSON"),
        ('{"instruction": "a", "output": "\\ud800"}', "broken Unicode"),
        ('["a", "b"]', "not an object"),
        ('{"instruction": "a", "output": ""}', "no answer"),
        ('{"instruction": "a", "output": null}', "no answer"),
        ('{"instruction": "a", "output": NaN}', "no answer"),
        ('{"instruction": "a", "output": Infinity}', "malformed JSON"),
        ('{"instruction": "", "output": "b"}', "no question"),
        ('{"instruction": "a", "output": ["b"]}', "wrong type"),
        ('{"instruction": "a", "output": {"text": "b"}}', "unknown role"),
        ('{"colour": "red"}', "unknown shape"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "roles out of order"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "roles out of order"),
        ('{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}', "empty message"),
        ('{"messages": [null, {"role": "assistant", "content": "b"}]}', "wrong type"),
        ('{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}', "unknown role"),
        ('{"messages": []}', "no messages"),
        ('{"instruction": "a", "output": "b", "x": ' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        ('{"instruction": "a", "output": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"instruction": ' + "9" * 5000 + ', "output": "b"}', "malformed JSON"),
    ],
)
def test_a_broken_row_is_rejected_with_file_row_and_reason_and_the_others_are_read(tmp_path, bad, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line(GOOD), line(bad), line(json.dumps(ROWS[1]))]) + b"\n")
    reading, rejects = rejected(path)
    assert questions(reading) == WANTED[:2]
    assert dict(rejects.invalid) == {reason: 1}
    assert (rejects.first[reason]["file"], rejects.first[reason]["row"]) == ("rows.jsonl", 2)
    assert rejects.first[reason]["detail"]


def test_rejected_rows_are_written_with_their_file_row_and_reason(tmp_path):
    (tmp_path / "rows.jsonl").write_text(GOOD + "\n" + '{"instruction": "a"}\n' + "{broken\n")
    rejects = Rejects(tmp_path / "rejected.jsonl", limit=1.0)
    read(str(tmp_path / "rows.jsonl"), rejects)
    rejects.close()
    lost = [json.loads(text) for text in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {(entry["file"], entry["row"], entry["reason"]) for entry in lost} == {
        ("rows.jsonl", 2, "unknown shape"),
        ("rows.jsonl", 3, "malformed JSON"),
    }


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.txt", "lines.json"])
def test_a_byte_that_is_not_utf8_costs_its_row_and_no_other(tmp_path, name):
    rows = [{"instruction": f"question {i}", "output": "caf\xe9" if i == 2 else f"answer {i}"} for i in range(5)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = {
        "rows.json": json.dumps(rows, ensure_ascii=False),
        "rows.csv": "instruction,output\n" + "\n".join(f"{row['instruction']},{row['output']}" for row in rows),
        "rows.txt": "\n".join(row["output"] for row in rows),
    }.get(name, lines)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    reading, rejects = rejected(tmp_path / name)
    assert [row["messages"][-1]["content"] for row in reading.table.rows()] == [f"answer {i}" for i in (0, 1, 3, 4)]
    assert dict(rejects.invalid) == {"not UTF-8": 1} and rejects.first["not UTF-8"]["row"] == 3


def test_what_is_no_utf16_costs_its_row_and_no_other(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode("utf-16-le")
    (tmp_path / "rows.jsonl").write_bytes(
        b"\xff\xfe" + lines.replace("question 2".encode("utf-16-le"), b"\x00\xd8" * 10)
    )
    reading, rejects = rejected(tmp_path / "rows.jsonl")
    assert questions(reading) == [pair for i, pair in enumerate(WANTED) if i != 2] and dict(rejects.invalid) == {
        "not UTF-8": 1
    }


def test_files_of_one_name_are_told_apart_by_their_folder(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(GOOD + "\n" + "{broken\n" * (folder == "b"))
    reading, rejects = rejected(tmp_path)
    assert [row["file"] for row in reading.table.rows()] == ["a/rows.jsonl", "b/rows.jsonl"]
    assert rejects.first["malformed JSON"]["file"] == "b/rows.jsonl"


def test_too_many_broken_rows_stop_the_job_with_the_share_the_reason_and_the_first_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((GOOD if i % 10 else "{broken") + "\n" for i in range(100)))
    with pytest.raises(
        TunebookError, match=r"10 of 100 rows \(10\.0 %\).*limit is 5\.0 %.*malformed JSON.*rows\.jsonl, row 1"
    ):
        read(str(path), Rejects(limit=0.05))
    assert len(read(str(path), Rejects(limit=0.11)).table) == 90


def test_a_line_of_ten_megabytes_is_read_and_one_without_end_is_rejected(tmp_path, monkeypatch):
    from helpers.data import files

    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b" * 10_000_000}) + "\n" + GOOD + "\n")
    reading, rejects = rejected(path)
    assert len(reading.table) == 2 and not rejects.invalid
    for module in (files,):
        monkeypatch.setattr(module, "MAX_LINE", 2**20)
    reading, rejects = rejected(path)
    assert len(reading.table) == 1 and dict(rejects.invalid) == {"line too long": 1}


@pytest.mark.parametrize("cut", [0.4, 0.98])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_file_that_ends_too_early_gives_the_rows_before_and_says_so(tmp_path, cut, packed):
    import zstandard

    rows = [{"instruction": f"question {i}", "output": f"{os.urandom(40).hex()}"} for i in range(12_000)]
    content = json.dumps(rows).encode()
    content = gzip.compress(content) if packed == ".gz" else zstandard.compress(content) if packed else content
    path = tmp_path / f"rows.json{packed}"
    path.write_bytes(content[: int(len(content) * cut)])
    reading, rejects = rejected(path)
    found = [row["messages"][0]["content"] for row in reading.table.rows()]
    assert found == [row["instruction"] for row in rows[: len(found)]] and 12_000 * cut - 2500 < len(found) < 12_000
    assert rejects.invalid and all("rows.json" in entry["file"] for entry in rejects.first.values())


def test_a_gzip_bomb_stops_being_unpacked(tmp_path, monkeypatch):
    from helpers.data import files

    monkeypatch.setattr(files, "MAX_UNPACKED", 2**20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress((GOOD + "\n").encode() + b"\n" * 5_000_000))
    reading, rejects = rejected(tmp_path / "bomb.jsonl.gz")
    assert len(reading.table) == 1 and "unpacks to more than 1000 times" in rejects.first["file ends early"]["detail"]


def test_csv_rows_with_missing_values_and_duplicated_headers_are_rejected_and_formulas_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text(
        'instruction,output\n"=cmd|\'/c calc\'!A0",+1\nonly one\na,b,c\n"multi\nline",yes\n'
    )
    reading, rejects = rejected(tmp_path / "a.csv")
    assert questions(reading) == [("=cmd|'/c calc'!A0", "+1"), ("multi\nline", "yes")]
    assert dict(rejects.invalid) == {"wrong number of values": 2}
    (tmp_path / "b.csv").write_text("instruction,instruction\na,b\n")
    with pytest.raises(TunebookError, match="duplicated column"):
        rejected(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_bytes(b"instruction,output\ncaf\xe9,b\nq,a\n")
    assert dict(rejected(tmp_path / "c.csv")[1].invalid) == {"not UTF-8": 1}


def test_a_row_of_many_mebibytes_in_a_json_list_is_read(tmp_path):
    rows = [ROWS[0], {"instruction": "question 1", "output": "b" * 5_000_000}, *ROWS[2:]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    reading, rejects = rejected(tmp_path / "rows.json")
    assert [len(answer) for _, answer in questions(reading)] == [8, 5_000_000, 8, 8, 8] and not rejects.invalid


def test_what_stands_behind_the_end_of_a_json_list_is_counted(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS) + "\n" + GOOD)
    reading, rejects = rejected(tmp_path / "rows.json")
    assert len(reading.table) == 5 and "stands behind the end of the list" in rejects.first["malformed JSON"]["detail"]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"train": ROWS, "test": ROWS * 20}),
        json.dumps(ROWS)[:-1] + ", {oops}, " + json.dumps(ROWS * 20)[1:],
        json.dumps(ROWS) + json.dumps(ROWS * 20),
    ],
)
def test_the_rest_of_a_list_that_cannot_be_read_counts_as_the_rows_that_it_may_hold(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    reading, rejects = rejected(tmp_path / "rows.json")
    assert len(reading.table) == 5 and 95 <= rejects.invalid.total() <= 105
    with pytest.raises(TunebookError, match="malformed JSON"):
        read(str(tmp_path / "rows.json"), Rejects())


def test_what_a_json_object_says_beside_its_rows_is_no_row(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": ROWS, "version": "1", "licence": "x" * 5000}))
    assert rejected(tmp_path / "rows.json")[1].invalid.total() == 1


def test_the_rows_behind_a_damage_of_a_parquet_file_are_counted(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [{"question": f"q{i}", "answer": os.urandom(20).hex()} for i in range(4000)]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet", row_group_size=1000, compression="zstd")
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    (tmp_path / "rows.parquet").write_bytes(content)
    reading, rejects = rejected(tmp_path / "rows.parquet")
    assert 0 < len(reading.table) < 4000 and len(reading.table) + rejects.invalid["broken parquet"] == 4000


def test_json_lines_under_the_name_json_may_be_longer_than_one_row(tmp_path, monkeypatch):
    from helpers.data import files

    monkeypatch.setattr(files, "MAX_LINE", 200)
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert questions(rejected(tmp_path / "rows.json")[0]) == WANTED


def test_a_file_of_rejects_begins_anew_with_each_reading(tmp_path):
    (tmp_path / "rows.jsonl").write_text(GOOD + "\n{broken\n")
    lost = tmp_path / "stage" / "rejected.jsonl"
    for time in range(2):
        rejects = Rejects(lost, limit=1.0)
        assert lost.parent.exists() == (time == 1)  # nothing is written before a row is lost
        read(str(tmp_path / "rows.jsonl"), rejects)
        rejects.close()
        rejects.close()
        assert len(lost.read_text().splitlines()) == 1
    Rejects(lost).close()
    assert lost.read_text() == ""


def test_a_csv_may_end_its_lines_as_it_likes(tmp_path):
    for end in ("\r", "\n", "\r\n"):
        text = end.join(["instruction,output", *(f"{row['instruction']},{row['output']}" for row in ROWS)])
        (tmp_path / "rows.csv").write_bytes(text.encode())
        assert questions(rejected(tmp_path / "rows.csv")[0]) == WANTED


def test_one_file_may_hold_rows_of_several_shapes(tmp_path):
    rows = [
        ROWS[0],
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"text": "words"},
        {"prompt": "q", "completion": "a", "label": False},
        {"nothing": 1},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading, rejects = rejected(tmp_path / "mixed.jsonl")
    assert [row["kind"] for row in reading.table.rows()] == ["sft", "sft", "preference", "text", "kto"]
    assert dict(rejects.invalid) == {"unknown shape": 1} and len(reading.sources[0].shapes) == 5


@pytest.mark.parametrize(
    "spec, said",
    [
        ("nowhere/missing.jsonl", "is not there"),
        ("", "No dataset is named"),
        ("*.nothing", "no readable file matches"),
        ("{folder}/model.pkl", "not read as data"),
        ("{folder}/empty", "no file that can be read"),
        ("{folder}/empty.jsonl", "holds no rows"),
        ("{folder}/rowz.jsonl", "Did you mean"),
    ],
)
def test_a_source_that_is_not_there_ends_with_a_sentence(tmp_path, spec, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text(GOOD)
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(TunebookError, match=said):
        read(spec.format(folder=tmp_path), Rejects())


def test_a_set_described_outside_of_its_folder_is_refused_and_the_hub_librarys_description_is_no_obstacle(
    tmp_path, monkeypatch
):
    (tmp_path / "secret.jsonl").write_text(GOOD)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(GOOD)
    for name in ("../secret.jsonl", str(tmp_path / "secret.jsonl")):
        (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": name}}))
        with pytest.raises(TunebookError, match="outside of its folder"):
            read("rows", Rejects(), info=str(folder))
    monkeypatch.chdir(folder)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "../secret.jsonl"}}))
    with pytest.raises(TunebookError, match="outside of its folder"):
        read("rows", Rejects(), info="dataset_info.json")
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {}, "citation": ""}))
    assert len(read(str(folder / "rows.jsonl"), Rejects()).table) == 1


def test_a_full_disk_under_the_hubs_cache_is_called_a_full_disk(monkeypatch):
    import errno

    import datasets

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(TunebookError, match="No space left on the disk for the dataset 'owner/name'"):
        read("owner/name", Rejects())


def test_a_hub_id_carries_revision_subset_and_split():
    (source,) = sources.find("owner/name@v1.2:subset:train[:10%]")
    assert source.hub == {"path": "owner/name", "revision": "v1.2", "name": "subset", "split": "train[:10%]"}
    (plain,) = sources.find("owner/name")
    assert plain.hub == {"path": "owner/name"}


def test_a_hub_set_that_cannot_be_had_ends_with_a_sentence():
    with pytest.raises(TunebookError, match=r"HF_HUB_OFFLINE is set, so the dataset 'nobody/no-such-set-anywhere'"):
        read("nobody/no-such-set-anywhere", Rejects())


def test_a_table_on_disk_reads_like_one_in_memory():
    rows = [
        make_row("sft", [{"role": "user", "content": f"q{i} é😀"}, {"role": "assistant", "content": "a"}], row=i)
        for i in range(2500)
    ]
    held, spilt = (Table.collect(batches(rows), spill_rows=limit) for limit in (10_000, 700))
    assert held._folder is None and spilt._folder is not None
    assert list(held.rows()) == list(spilt.rows()) == rows and len(spilt) == 2500
    assert list(spilt.rows()) == rows  # a second time
