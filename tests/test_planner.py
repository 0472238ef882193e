"""Plans: measured settings predicted, the asked batch kept, refusals that name the remedy, no GPU needed."""

import json
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from helpers.errors import TunebookError
from helpers.planner import cost_model, gpus
from helpers.planner import plan as planner

MEASURED = ("h200_2026-11-22", "h200_2026-11-25", "h100_2026-11-25", "gpu_2026-11-26")  # in ci/results/
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SIZES = {
    "135m": (576, 1536, 30, 9, 3, 49152),
    "360m": (960, 2560, 32, 15, 5, 49152),
    "1.7b": (2048, 8192, 24, 32, 32, 49152),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
LENGTHS = [50 + (n * 37) % 350 for n in range(400)]


def llama(size):
    return LlamaConfig(
        **dict(zip(NAMES, SIZES[size], strict=True)), tie_word_embeddings=size in ("135m", "360m", "1.7b")
    )


@pytest.fixture(scope="module")
def shapes():
    return {size: cost_model.shape_of(llama(size)) for size in SIZES}


def test_the_shape_counts_every_parameter(shapes):
    assert shapes["8b"].parameters == 8_030_261_248 and shapes["8b"].linear_parameters == 6_979_321_856
    assert shapes["360m"].head == 0  # tied


@pytest.mark.parametrize("measured", MEASURED)
def test_measured_peaks_are_predicted_within_seven_percent(shapes, measured):
    from helpers import machine

    lines = [
        json.loads(line) for line in (machine.PROJECT / "ci" / "results" / f"{measured}.jsonl").read_text().splitlines()
    ]
    settings = [line for line in lines if line["arm"] == "planner"]
    assert len(settings) >= 12
    for line in settings:
        setting = cost_model.Setting(
            line["tokens"],
            recompute=line["recompute"],
            offload=line["offload"],
            quantize=line["base"],
            rank=line["rank"],
            method="qlora" if line["base"] == "nf4" else "lora",
            backend=line.get("backend", "hf"),
        )
        assert cost_model.peak_gib(shapes[line["size"]], setting) == pytest.approx(line["peak_gib"], rel=0.07), line


def test_a_plan_keeps_the_batch_and_fits_its_card():
    for card in gpus.CARDS:
        plan = planner.plan({"batch_size": 64, "plan_for": card, "method": "qlora"}, LENGTHS, llama("8b"))
        assert plan.option.need_gib <= plan.card.total_gib and plan.batch_size == 64 and plan.row_tokens >= max(LENGTHS)
        low, high = plan.seconds[1:]
        assert low < plan.seconds[0] < high
        assert plan.attention == ("packed_sdpa" if card == "T4" else "packed_varlen") and plan.reason


def test_more_memory_is_never_slower_and_recomputation_only_where_it_must_be():
    speeds = []
    for total in (12, 20, 40, 80, 139):
        plan = planner.plan({"batch_size": 64}, LENGTHS, llama("8b"), card=replace(gpus.named("H200"), total_gib=total))
        speeds.append(plan.tokens_per_s)
    assert speeds == sorted(speeds) and plan.recompute == 0


def test_two_processes_share_the_same_batch():
    one, two = (
        planner.plan({"batch_size": 64, "plan_for": "H200"}, LENGTHS, llama("8b"), world_size=n) for n in (1, 2)
    )
    assert two.batch_size == one.batch_size and 1.7 < two.tokens_per_s / one.tokens_per_s <= 2.0


@pytest.mark.parametrize(
    ("values", "lengths", "remedy"),
    [
        ({"method": "full"}, LENGTHS, "set method to qlora"),
        ({"method": "qlora", "recompute": "none"}, [*LENGTHS, 9000], "set recompute to auto"),
        ({"method": "qlora"}, [*LENGTHS, 300_000], "lower max_length"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_change_that_fits(values, lengths, remedy):
    with pytest.raises(TunebookError, match=remedy):
        planner.plan({"batch_size": 8, "plan_for": "T4", **values}, lengths, llama("8b"))


def test_a_shorter_row_that_the_refusal_names_does_fit():
    with pytest.raises(TunebookError) as refused:
        planner.plan({"batch_size": 8, "plan_for": "T4"}, [300_000], llama("8b"))
    named = int(str(refused.value).split("rows of at most ")[1].split()[0])
    assert planner.plan({"batch_size": 8, "plan_for": "T4"}, [named], llama("8b")).option.fits


def test_layer_inputs_are_moved_only_where_main_memory_has_room():
    t4, values = gpus.named("T4"), {"batch_size": 1, "method": "qlora"}
    assert (
        planner.longest_context(llama("8b"), t4) < planner.longest_context(llama("8b"), replace(t4, host_gib=64)) / 1.5
    )
    with pytest.raises(TunebookError, match=r"GiB of main memory a process.* rows of at most \d+ tokens fit"):
        planner.plan(values, [60_000], llama("8b"), card=t4)
    plan = planner.plan(values, [60_000], llama("8b"), card=replace(t4, host_gib=64))
    assert plan.offload and plan.option.offloaded_gib == pytest.approx(60_000 * 4096 * 2 * 32 / 2**30)
    assert f"inputs in main memory ({plan.option.offloaded_gib:.1f} GiB)" in str(plan)


def test_a_probing_step_corrects_the_plan_and_its_error_is_kept():
    plan = planner.plan({"batch_size": 64, "plan_for": "H200"}, LENGTHS, llama("3b"))
    seen = plan.correct(peak_gib=plan.peak_gib * 1.1, tokens_per_s=plan.tokens_per_s * 0.8)
    assert seen.peak_gib == pytest.approx(plan.peak_gib * 1.1) and seen.tokens_per_s == pytest.approx(
        plan.tokens_per_s * 0.8
    )
    assert seen.errors == {
        "peak_gib": pytest.approx(1 / 1.1 - 1, abs=1e-3),
        "tokens_per_s": pytest.approx(0.25, abs=1e-3),
    }
    assert json.loads(json.dumps(seen.as_dict()))["probed"]


def test_the_table_names_the_choice_and_what_else_was_weighed():
    plan = planner.plan({"batch_size": 64, "plan_for": "A100-40"}, LENGTHS, llama("8b"))
    text, page = str(plan), plan._repr_html_()
    assert (
        text.count("chosen") == 1
        and "16-bit" in text
        and "unsloth" in text
        and "<table" in page
        and "<script" not in page
    )


def test_an_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(TunebookError, match="T4, L4, A100-40"):
        planner.plan({"batch_size": 8, "plan_for": "A9"}, LENGTHS, llama("360m"))


def test_a_small_model_whose_launches_decide_gets_wide_error_bars():
    for size, batch, spread in (("360m", 8, cost_model.LAUNCH_SPREAD), ("8b", 256, gpus.named("H200").spread)):
        plan = planner.plan({"batch_size": batch, "plan_for": "H200"}, LENGTHS, llama(size))
        middle, low, high = plan.seconds
        assert (high - middle) / middle == pytest.approx(spread) and (middle - low) / middle == pytest.approx(spread)
    assert gpus.named("H200").spread < cost_model.LAUNCH_SPREAD
