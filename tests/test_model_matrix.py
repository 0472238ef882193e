"""The committed table of families: complete, made by its command, and nothing in it fails without a reason."""

import pytest

from ci import model_matrix
from ci.model_families import FAMILIES, REASONS

FOUND = model_matrix.read()


def test_every_family_has_a_result_and_the_page_is_the_one_that_the_command_writes():
    assert list(FOUND) == list(FAMILIES)
    assert {line["model_type"] for line in FOUND.values()} == {kind for kind, _ in FAMILIES.values()}
    assert model_matrix.PAGE.read_text(encoding="utf-8") == model_matrix.page(FOUND)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_refused_before_its_training_or_has_a_reason(family):
    line = FOUND[family]
    assert bool(model_matrix.bad(line)) == (family in REASONS), line
    assert not any("/tmp" in str(cell) for cell in line.values())


def test_what_must_work_works():
    """Dense families and four mixtures exactly, with their experts trained and exported; hybrids trained exactly."""
    for line in FOUND.values():
        assert line["SFT"] == line["ORPO"] == "exact" or line["SFT"].startswith("refused"), line
    for family in ("Mixtral", "Qwen3-MoE", "gpt-oss", "OLMoE", "DeepSeek-V3", "Qwen3-Next", "Granite 4 hybrid"):
        assert FOUND[family]["experts"] == "trained" and FOUND[family]["GGUF"].startswith("gates passed"), family
    for family in ("LFM2", "Falcon-H1", "Llama 3.2", "Qwen3", "Gemma 3", "Mistral Small 3 text"):
        assert FOUND[family]["GGUF"].startswith("gates passed"), family


def test_a_worse_result_counts_as_worse():
    right = dict.fromkeys(model_matrix.PARTS, "exact")
    for cell in ("crash: x", "late: y", "off by 1e-3", "failed logits", "3 of 4 answers equal (transformers)", ""):
        assert model_matrix.bad(right | {"GGUF": cell}) == ["GGUF"]
        assert model_matrix._good(right | {"GGUF": cell}) < model_matrix._good(right)
    refused = right | {"GGUF": "refused: no converter"}
    assert not model_matrix.bad(refused) and model_matrix._good(refused) < model_matrix._good(right)
