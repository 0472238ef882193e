"""The cache: what is taken from it is what was put there, or nothing."""

import json
import os

import pytest

from helpers import cache


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def entry(tmp_path, place):
    (tmp_path / "rows.parquet").write_bytes(bytes(range(256)) * 100)
    cache.put("data", "k", [tmp_path / "rows.parquet"], {"rows": 3})
    (tmp_path / "into").mkdir()
    return place / "data" / "k"


def test_an_entry_comes_back_whole_with_its_note(entry, tmp_path):
    assert cache.get("data", "k", tmp_path / "into") == {"rows": 3}
    assert (tmp_path / "into" / "rows.parquet").read_bytes() == (tmp_path / "rows.parquet").read_bytes()
    assert cache.get("data", "other", tmp_path / "into") is None


@pytest.mark.parametrize("harm", ["bit", "short", "missing", "note", "no JSON"])
def test_a_damaged_entry_gives_nothing_and_is_dropped(entry, tmp_path, harm, capsys):
    file, notes = entry / "rows.parquet", entry / "entry.json"
    content = bytearray(file.read_bytes())
    content[1000] ^= 4
    {
        "bit": lambda: file.write_bytes(content),
        "short": lambda: file.write_bytes(content[:999]),
        "missing": lambda: file.unlink(),
        "note": lambda: notes.write_text(notes.read_text().replace('"rows": 3', '"rows": 7')),
        "no JSON": lambda: notes.write_text("{"),
    }[harm]()
    assert cache.get("data", "k", tmp_path / "into") is None
    assert list((tmp_path / "into").iterdir()) == [] and not entry.exists()
    assert "damaged" in capsys.readouterr().out


def test_the_entries_used_longest_ago_make_room(tmp_path, place, monkeypatch):
    monkeypatch.setattr(cache, "KEEP_BYTES", 2500)
    (tmp_path / "file").write_bytes(bytes(1000))
    for number, name in enumerate("abc"):
        cache.put("data", name, [tmp_path / "file"])
        os.utime(place / "data" / name / "entry.json", (number, number))
        if name == "b":
            assert cache.get("data", "a", tmp_path) == {}
    assert sorted(p.name for p in (place / "data").iterdir()) == ["a", "c"]


def test_a_cache_that_cannot_be_written_is_announced(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "file"))
    cache.put("data", "k", [tmp_path / "file"])
    assert "continues without it" in capsys.readouterr().out


def test_answers_survive_a_kill_and_a_flipped_bit_is_asked_again(place):
    answers = cache.Answers("answers", cache.key("model", 1))
    answers.put("one", {"text": "é\ud800"})
    answers.put("two", [1, 2])
    with open(answers.path, "ab") as file:
        file.write(b'{"k": "three", "v"')
    again = cache.Answers("answers", cache.key("model", 1))
    assert again.get("two") == [1, 2] and again.get("three") is None
    again.put("three", 3)
    assert cache.Answers("answers", cache.key("model", 1)).get("three") == 3
    answers.path.write_bytes(answers.path.read_bytes().replace(b"[1, 2]", b"[1, 3]"))
    assert cache.Answers("answers", cache.key("model", 1)).get("two") is None


def test_a_key_tells_its_parts_apart():
    assert len({cache.key("a", "b"), cache.key("ab"), cache.key(["a", "b"]), cache.key("b", "a")}) == 4
    assert len(cache.key(1)) == 32


def test_hashes_follow_the_content(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"a": 1}))
    first = cache.content_hash(model)
    (model / "README.md").write_text("words")
    assert cache.content_hash(model) == first
    (model / "config.json").write_text(json.dumps({"a": 22}))
    assert cache.content_hash(model) != first
    assert cache.content_hash(model / "config.json") == cache.content_hash(str(model / "config.json"))
