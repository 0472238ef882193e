"""The cache: what is taken from it is what was put there, or nothing."""

import json

import pytest

from helpers import cache


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
