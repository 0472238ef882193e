"""The proposed learning rate: published values at published sizes, warnings, the adapter's capacity."""

import pytest
from test_plan import LENGTHS, llama, plan

from helpers import params as parameters
from helpers.planner import proposals, row_plan


@pytest.mark.parametrize(
    ("stage", "given", "billions", "rate"),
    [
        ("sft", {}, 0.1345, 1e-3),
        ("sft", {"method": "lora", "rank": 64}, 0.1345, 1e-3),
        ("sft", {}, 8.03, 2e-4),
        ("sft", {}, 65, 9e-5),
        ("sft", {"method": "full"}, 8.03, 2e-5),
        ("sft", {"method": "freeze"}, 0.1345, 1e-4),
        ("sft", {"optimizer": "lion"}, 8.03, 4e-5),
        ("sft", {"rslora": True}, 8.03, 1e-4),
        ("sft", {"alpha": 16}, 8.03, 3e-4),
        ("orpo", {}, 0.1345, 1e-4),
        ("orpo", {}, 8.03, 7e-6),
        ("orpo", {"loss": "dpo"}, 7.2, 7e-6),
    ],
)
def test_a_rate_is_proposed_by_method_rank_and_size(stage, given, billions, rate):
    assert proposals.propose(parameters.resolve(stage, given), int(billions * 1e9))[0] == pytest.approx(rate)


def test_the_plan_shows_the_rate_its_source_and_a_warning_five_times_off():
    made = plan({"plan_for": "H100"}, LENGTHS, llama("8b"))
    assert made.learning_rate == 2e-4 == made.as_dict()["learning_rate"]
    assert "Learning rate 0.0002, proposed for" in str(made) and "LoRA Without Regret" in str(made)
    for given, said in ((5e-4, ""), (1.1e-3, "6 times above the 0.0002"), (1e-5, "20 times below")):
        text = str(plan({"plan_for": "H100", "learning_rate": given}, LENGTHS, llama("8b")))
        assert f"Learning rate {given:g}, as given." in text and ("Warning" in text) == bool(said) and said in text


def test_the_plan_compares_the_adapters_capacity_with_the_tokens():
    small = str(plan({"plan_for": "H100"}, LENGTHS, llama("8b")))
    assert f"41,943,040 parameters × 2 bits against {sum(LENGTHS):,} tokens at most, 1 bit each: enough" in small
    many = str(plan({"plan_for": "H100", "rank": 1, "target_modules": "q_proj"}, LENGTHS * 10, llama("135m")))
    assert "too little to learn them by heart: raise rank" in many
    assert "Adapter capacity" not in str(plan({"plan_for": "H200", "method": "full"}, LENGTHS, llama("360m")))


def test_single_quantisation_whole_modules_and_a_given_accumulation_are_planned():
    one = plan({"plan_for": "H100", "method": "qlora", "batch_size": 64}, LENGTHS, llama("8b"))
    single = plan(
        {"plan_for": "H100", "method": "qlora", "batch_size": 64, "double_quant": False}, LENGTHS, llama("8b")
    )
    more = single.shape.linear_parameters * (4.5 - 4.1275) / 8 / 2**30
    fixed = {"recompute": "none", "row_tokens": 1024, "batch_size": 64, "plan_for": "H100", "method": "qlora"}
    few, many = (plan({**fixed, "double_quant": double}, LENGTHS, llama("8b")).peak_gib for double in (True, False))
    assert many - few == pytest.approx(more, rel=1e-3) and one.setting.quantize == single.setting.quantize == "nf4"
    whole = plan({**fixed, "modules_to_save": "embed_tokens,lm_head"}, LENGTHS, llama("8b")).peak_gib
    assert whole - few == pytest.approx(2 * 128256 * 4096 * (4 + 4 + 8) / 2**30, rel=1e-3)
    given = plan({"plan_for": "H100", "micro_batch": 2, "accumulation": 4}, LENGTHS, llama("8b"))
    assert given.accumulation == 4 and given.batch_size == 8 and "50 steps of 8 rows" in str(given)
    packed = plan({"plan_for": "H100", "batch_unit": "packed"}, LENGTHS, llama("8b"), sequence=2048)
    assert packed.steps == -(-len(row_plan.best_fit(LENGTHS, 2048)) // 8)
    assert "steps of 8 packed rows of up to 2,048 tokens" in str(packed)
    assert "group_by_length changes nothing" in str(plan({"group_by_length": True}, LENGTHS[:20], llama("360m")))
