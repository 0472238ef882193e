"""Plans: measured settings predicted, the asked batch kept, refusals that name the remedy, no GPU needed."""

import json
import random
import re
from dataclasses import replace

import pytest
import transformers
from transformers import LlamaConfig, MixtralConfig, Qwen2Config

from ci import gpu_session
from helpers import display, machine
from helpers import params as parameters
from helpers.errors import TunebookError
from helpers.model import layer_kinds
from helpers.planner import cost_model, row_plan
from helpers.planner import plan as planner

# In ci/results/. The first set the constants of cost_model; the settings of the second (bench_probe.SETTINGS, and its
# UNSLOTH_SETTINGS) were chosen when the constants stood.
SEEN = ("h200_calibration", "h200_2026-11-22", "h200_2026-11-25")
UNSEEN = {"h100_2026-11-25": "H100", "gpu_2026-11-26": "H200"}
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


def plan(values, lengths, config, **more):
    given = {"run": "r", "train_on": "all", **values}
    return planner.plan(parameters.resolve("sft", given), lengths, config, **more)


@pytest.fixture(scope="module")
def shapes():
    return {size: layer_kinds.Shape(llama(size)) for size in SIZES}


def test_the_shape_counts_every_parameter(shapes):
    assert shapes["8b"].parameters == 8_030_261_248 and shapes["8b"].linear_parameters == 6_979_321_856
    assert shapes["360m"].head == 0  # tied


def measured(name):
    lines = (machine.PROJECT / "ci" / "results" / f"{name}.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line.get("arm") == "planner"]


def setting_of(line):
    return cost_model.Setting(
        line["tokens"],
        parameters.SftParams(method="qlora" if line["base"] == "nf4" else "lora", rank=line["rank"], train_on="all"),
        recompute=line["recompute"],
        offload=line["offload"],
        backend=line.get("backend", "hf"),
    )


@pytest.mark.parametrize("name", UNSEEN)
def test_peaks_of_settings_that_set_no_constant_are_predicted_within_five_percent(shapes, name):
    known = [setting_of(line) for seen in SEEN for line in measured(seen)]
    lines = [line for line in measured(name) if setting_of(line) not in known]
    assert len(lines) == 17
    for line in lines:
        assert cost_model.peak_gib(shapes[line["size"]], setting_of(line)) == pytest.approx(
            line["peak_gib"], rel=0.05
        ), line


@pytest.mark.parametrize(("name", "least"), [("gpu_2026-11-26", 16), ("h100_2026-11-25", 14)])
def test_times_of_settings_that_set_no_constant_lie_within_their_error_bars(shapes, name, least):
    within = 0
    for line in measured(name):
        shape, setting, card = shapes[line["size"]], setting_of(line), cost_model.card_named(UNSEEN[name])
        square = 1.08 * line["tokens"] / line["documents"]  # documents of a third to the whole of the longest
        guess, launching = cost_model.row_seconds(shape, setting, card, square)
        spread = cost_model.LAUNCH_SPREAD if launching else card.spread
        within += abs(guess / line["seconds"] - 1) <= spread
    assert within >= least


def test_only_memory_that_is_free_now_is_planned_with(monkeypatch):
    h100 = machine.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.1)
    monkeypatch.setattr(machine, "gpu", lambda: h100)
    monkeypatch.setattr(machine, "free_memory_gib", lambda: 50.0)
    monkeypatch.setattr(machine, "free_gpu_gib", lambda: 78.6)
    alone = cost_model.card_here()
    assert alone.total_gib == pytest.approx(79.1) and alone.tflops == cost_model.card_named("H100").tflops
    assert 50 < alone.host_gib < 60, "what this process holds already is its own"
    monkeypatch.setattr(machine, "free_gpu_gib", lambda: 9.0)  # another program holds the rest
    beside = cost_model.card_here()
    assert beside.total_gib == pytest.approx(9.0 + cost_model.CONTEXT_GIB)
    values = {"batch_size": 64, "method": "lora"}
    plan(values, LENGTHS, llama("8b"), card=alone)
    with pytest.raises(TunebookError, match="set method to qlora"):
        plan(values, LENGTHS, llama("8b"), card=beside)


def test_a_plan_keeps_the_batch_and_fits_its_card():
    for card in cost_model.CARDS:
        made = plan({"batch_size": 64, "plan_for": card, "method": "qlora"}, LENGTHS, llama("8b"))
        assert (
            made.option.need_gib <= made.card.total_gib
            and made.batch_size == 64
            and made.setting.row_tokens >= max(LENGTHS)
        )
        low, high = made.seconds[1:]
        assert low < made.seconds[0] < high
        assert made.attention == ("packed_sdpa" if card == "T4" else "packed_varlen") and made.reasons


def test_more_memory_is_never_slower_and_recomputation_only_where_it_must_be():
    speeds = []
    for total in (12, 20, 40, 80, 139):
        made = plan(
            {"batch_size": 64}, LENGTHS, llama("8b"), card=replace(cost_model.card_named("H200"), total_gib=total)
        )
        speeds.append(made.tokens_per_s)
    assert speeds == sorted(speeds) and made.setting.recompute == 0


def test_two_processes_share_the_same_batch():
    one, two = (plan({"batch_size": 64, "plan_for": "H200"}, LENGTHS, llama("8b"), world_size=n) for n in (1, 2))
    assert two.batch_size == one.batch_size and 1.7 < two.tokens_per_s / one.tokens_per_s <= 2.0


SHAPES = {
    "70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
    "32b": Qwen2Config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}


def test_a_sharded_peak_follows_from_the_one_that_was_measured_on_one_gpu(shapes):
    lines = (machine.PROJECT / "ci" / "results" / "h100_2026-11-25.jsonl").read_text().splitlines()
    seen = {line["arm"]: line["peak_gib"] for line in map(json.loads, lines) if "peak_gib" in line}
    one = cost_model.Setting(0, parameters.SftParams(method="lora", rank=16, train_on="all"), accumulates=True)
    settings = [replace(one, row_tokens=tokens) for tokens in range(11_000, 12_300, 20)]  # the longest row it had
    one = min(settings, key=lambda s: abs(cost_model.peak_gib(shapes["8b"], s) - seen["one_gpu_lora"]))
    two = cost_model.peak_gib(shapes["8b"], replace(one, shards=2))
    assert two == pytest.approx(seen["two_gpus_sharded"], rel=0.01)


def recorded_sharded():
    """(arm's base, method, recorded line) of every sharded job in ci/results/ that says its peak."""
    arms = {arm.name: arm for arm in gpu_session.ARMS}
    arms["two_gpus_sharded"] = gpu_session.job("two_gpus_sharded", "8b", 2, method="lora")
    for file in sorted((machine.PROJECT / "ci" / "results").glob("h*00_*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            name = line.get("arm") or line.get("recipe")
            if name == "llama-factory-full-4gpu" and "peak_gib" in line:
                yield "8b", "full", {"processes": line["gpus"], "accumulation": 1, **line}
            elif name == "two_gpus_sharded" or line.get("sharded"):
                settings = dict(word.split("=") for word in arms[name].command if "=" in word)
                yield arms[name].shape, settings["method"], line


# Tokens of the longest row that a plan's row_tokens came to: alpaca_en_demo.json in SmolLM2's tokens.
LONGEST = {12288: 11817, 2048: 1821, 856: 856}


def test_every_sharded_peak_that_was_measured_is_planned_within_seven_percent():
    seen = []
    for size, method, line in recorded_sharded():
        kind, sizes = gpu_session.SHAPES[size]
        config = getattr(transformers, f"{kind}Config")(**{"tie_word_embeddings": False, **sizes})
        tokens, world, rows = LONGEST[line["row_tokens"]], line["processes"], line["accumulation"]
        values = {"method": method, "rank": 16, "batch_size": rows * world, "row_tokens": tokens, "plan_for": "H100"}
        values |= {"recompute": "none", "shard_weights": method == "qlora"}
        made = plan(values, [tokens] * rows * world, config, world_size=world)
        assert made.setting.sharded and made.accumulation == rows
        assert made.peak_gib == pytest.approx(line["peak_gib"], rel=0.07), (size, method, world)
        seen.append((size, method, world))
    assert {("8b", "lora", 2), ("32b", "lora", 4), ("70b", "qlora", 4), ("8b", "full", 4)} <= set(seen)


def test_a_reference_takes_time_and_no_memory_so_it_costs_no_checkpointing():
    """It is asked without gradients before a row's activations are there: the same rows, the same setting."""
    values = {"method": "qlora", "start_from": "base", "batch_size": 8, "row_tokens": 9984}
    for total in (12, 24, 40, 79.1):
        made = {
            loss: planner.plan(
                parameters.resolve("orpo", {**values, "loss": loss}),
                [1248] * 64,
                llama("8b"),
                card=replace(cost_model.card_named("H100"), total_gib=total),
            )
            for loss in ("orpo", "simpo", "dpo", "kto")
        }
        settings = {(p.setting.recompute, p.setting.offload, p.setting.tile_mlp) for p in made.values()}
        assert len(settings) == 1 and len({p.peak_gib for p in made.values()}) == 1
        assert made["orpo"].tokens_per_s > made["dpo"].tokens_per_s > made["kto"].tokens_per_s
    assert made["dpo"].setting.recompute == 0


def test_a_reference_that_is_kept_costs_a_forward_pass_in_the_first_epoch_alone():
    """DPO's share of ORPO's speed on four rows of an H100: 13,228 of 12,814 tokens/s were measured once it is kept."""

    def speed(**given):
        values = {"method": "qlora", "start_from": "base", "batch_size": 8, "row_tokens": 9984, **given}
        card = cost_model.card_named("H100")
        return planner.plan(parameters.resolve("orpo", values), [1248] * 64, llama("8b"), card=card).tokens_per_s

    orpo = speed(loss="orpo")
    for loss in ("dpo", "kto"):
        once, thrice = (speed(loss=loss, epochs=epochs) / orpo for epochs in (1.0, 3.0))
        assert once < thrice < 1.05 and (thrice > 0.8) == (loss == "dpo")
        assert speed(loss=loss, epochs=0.5) == speed(loss=loss, epochs=1.0), "each row is met once"
        assert speed(loss=loss, epochs=3.0, max_minutes=5.0) / orpo == once, "it may end in its first epoch"


def test_full_tuning_of_an_8b_is_refused_on_one_gpu_of_80_gib_and_shared_by_two_and_four(shapes):
    alone = {"method": "full", "batch_size": 333, "plan_for": "H100"}
    with pytest.raises(TunebookError, match=r"set method to qlora, which fits \(or 2 such GPUs, .*--gpus 2\)"):
        plan(alone, LENGTHS, llama("8b"))
    two, four = (plan(alone, LENGTHS, llama("8b"), world_size=n) for n in (2, 4))
    state = 16 * shapes["8b"].parameters / cost_model.GIB  # fp32 weights and gradients, and Adam's two
    for made, n in ((two, 2), (four, 4)):
        held = cost_model.state_bytes(shapes["8b"], made.setting) / cost_model.GIB
        assert 5 < held - state / n < 9, "and beside its share what is gathered: layers, head, their gradients"
        assert made.option.need_gib <= made.card.total_gib and made.batch_size == 333
    assert two.setting.recompute > four.setting.recompute == 0


def test_one_gpu_keeps_the_16_bit_copies_of_trained_weights_too(shapes):
    s = cost_model.Setting(0, parameters.SftParams(method="full"))
    assert cost_model.state_bytes(shapes["8b"], s) == 18 * shapes["8b"].parameters


@pytest.mark.parametrize(
    ("size", "method", "world", "fits"),
    [
        ("70b", "qlora", 1, True),
        ("70b", "qlora", 2, True),
        ("70b", "lora", 1, False),
        ("70b", "lora", 4, True),
        ("70b", "full", 4, False),
        ("32b", "lora", 4, True),
        ("32b", "full", 4, False),
    ],
)
def test_shapes_that_no_single_gpu_holds_are_planned_from_their_configs(size, method, world, fits):
    values = {"method": method, "batch_size": 64, "plan_for": "H100"}
    if fits:
        assert plan(values, LENGTHS, SHAPES[size], world_size=world).option.fits
        return
    remedy = "cpu_offload to True" if method == "full" else r"set method to qlora.*tunebook train --gpus 2"
    with pytest.raises(TunebookError, match=remedy):
        plan(values, LENGTHS, SHAPES[size], world_size=world)


def test_a_four_bit_base_is_whole_in_each_gpu_that_has_room_and_sharded_over_those_that_have_not():
    values = {"method": "qlora", "batch_size": 64, "plan_for": "H100"}
    whole = plan(values, LENGTHS, SHAPES["70b"], world_size=4)
    assert not whole.setting.sharded
    asked = plan({**values, "shard_weights": True}, LENGTHS, SHAPES["70b"], world_size=4)
    assert asked.setting.sharded and asked.setting.recompute < whole.setting.recompute
    a100 = cost_model.CARDS["A100-40"]
    small = plan(values, LENGTHS, SHAPES["70b"], world_size=4, card=a100)
    assert small.setting.sharded and small.setting.params.shard_weights and "sharded" in " ".join(small.reasons)
    assert cost_model.state_bytes(small.shape, small.setting) < 0.45 * cost_model.whole_state_bytes(
        small.shape, small.setting
    )
    with pytest.raises(TunebookError, match="tunebook train --gpus 2"):
        plan(values, LENGTHS, SHAPES["70b"], card=a100)
    with pytest.raises(TunebookError, match="set cpu_offload to True"):
        plan(values, LENGTHS, SHAPES["70b"], world_size=4, card=replace(cost_model.CARDS["T4"], host_gib=200))


def test_what_is_offloaded_counts_against_host_memory_of_the_machine_and_costs_time(monkeypatch):
    h100, values = cost_model.card_named("H100"), {"method": "full", "batch_size": 64}
    kept, away = (
        plan({**values, "cpu_offload": on}, LENGTHS, llama("8b"), card=h100, world_size=4) for on in (False, True)
    )
    assert away.peak_gib < kept.peak_gib - 25 and away.tokens_per_s < kept.tokens_per_s
    assert away.option.offloaded_gib == pytest.approx(4 * 8.03e9 * 4 / 4 / 2**30, rel=0.01)
    small = {"card": replace(h100, host_gib=100), "world_size": 4}
    with pytest.raises(TunebookError, match="host memory"):
        plan({**values, "cpu_offload": True}, LENGTHS, llama("8b"), **small)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun says on each of two machines
    assert plan({**values, "cpu_offload": True}, LENGTHS, llama("8b"), **small).option.fits


@pytest.mark.parametrize(
    ("values", "lengths", "remedy"),
    [
        ({"method": "full"}, LENGTHS, "set method to qlora"),
        ({"method": "qlora", "recompute": "none"}, [*LENGTHS, 9000], "set recompute to auto"),
        ({"method": "qlora"}, [*LENGTHS, 300_000], "lower max_length"),
        ({"row_tokens": 200}, [10, 300], "row_tokens is 200 and the longest training row has 300 tokens"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_change_that_fits(values, lengths, remedy):
    with pytest.raises(TunebookError, match=remedy):
        plan({"batch_size": 8, "plan_for": "T4", **values}, lengths, llama("8b"))


def test_a_shorter_row_that_the_refusal_names_does_fit():
    with pytest.raises(TunebookError) as refused:
        plan({"batch_size": 8, "plan_for": "T4"}, [300_000], llama("8b"))
    named = int(str(refused.value).split("rows of at most ")[1].split()[0])
    assert plan({"batch_size": 8, "plan_for": "T4"}, [named], llama("8b")).option.fits


def test_layer_inputs_are_offloaded_only_where_host_memory_has_room():
    t4, values = cost_model.card_named("T4"), {"batch_size": 1, "method": "qlora"}
    with pytest.raises(TunebookError, match=r"GiB of host memory a process.* rows of at most \d+ tokens fit"):
        plan(values, [60_000], llama("8b"), card=t4)
    made = plan(values, [60_000], llama("8b"), card=replace(t4, host_gib=64))
    assert made.setting.offload and made.option.offloaded_gib == pytest.approx(60_000 * 4096 * 2 * 32 / 2**30)
    assert f"inputs in host memory ({made.option.offloaded_gib:.1f} GiB)" in str(made)


def test_a_probing_step_corrects_the_plan_and_its_error_is_kept():
    made = plan({"batch_size": 64, "plan_for": "H200"}, LENGTHS, llama("3b"))
    seen = made.correct(peak_gib=made.peak_gib * 1.1, tokens_per_s=made.tokens_per_s * 0.8)
    assert seen.peak_gib == pytest.approx(made.peak_gib * 1.1) and seen.tokens_per_s == pytest.approx(
        made.tokens_per_s * 0.8
    )
    assert seen.errors == {
        "peak_gib": pytest.approx(1 / 1.1 - 1, abs=1e-3),
        "tokens_per_s": pytest.approx(0.25, abs=1e-3),
    }
    assert json.loads(json.dumps(seen.as_dict()))["probed"]


def test_the_table_names_the_choice_and_what_else_was_weighed():
    made = plan({"batch_size": 64, "plan_for": "A100-40"}, LENGTHS, llama("8b"))
    text, page = str(made), made._repr_html_()
    assert text.count("chosen") == 1 and "16-bit" in text and "<table" in page and "<script" not in page


def test_an_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(TunebookError, match="T4, L4, A100-40"):
        plan({"batch_size": 8, "plan_for": "A9"}, LENGTHS, llama("360m"))


def test_a_small_model_whose_launches_decide_gets_wide_error_bars():
    for size, batch, spread in (
        ("360m", 8, cost_model.LAUNCH_SPREAD),
        ("8b", 256, cost_model.card_named("H200").spread),
    ):
        made = plan({"batch_size": batch, "plan_for": "H200"}, LENGTHS, llama(size))
        middle, low, high = made.seconds
        assert (high - middle) / middle == pytest.approx(spread) and (middle - low) / middle == pytest.approx(spread)
    assert cost_model.card_named("H200").spread < cost_model.LAUNCH_SPREAD


@pytest.mark.parametrize(
    ("card", "size", "given", "method", "said"),
    [
        ("H100", "8b", {}, "lora", r"lora, on the 16-bit base: it needs [\d.]+ GiB, under 85 % of 79.1 GiB \(QLoRA: "),
        (
            "H100",
            "8b",
            {"batch_size": 256},
            "lora",
            r"lora, on a base in FP8: it needs [\d.]+ GiB, .*and held-out loss 0",
        ),
        (
            "H100",
            "8b",
            {"batch_size": 256},
            "lora",
            r"\(16 bits, by quantize 'none': [\d.]+ GiB, 1\.[2-6] times as long; ",
        ),
        ("H100", "8b", {"batch_size": 256, "dora": True}, "lora", "on the 16-bit base"),
        ("L4", "8b", {}, "lora", r"lora, on the 16-bit base: .* times as long\); quantize 'fp8': [\d.]+ GiB"),
        ("A100-80", "8b", {}, "lora", r"\(QLoRA: [\d.]+ GiB, [\d.]+ times as long\)\. What"),
        ("H100", "8b", {"quantize": "none"}, "lora", r"\(QLoRA: [\d.]+ GiB, [\d.]+ times as long\)\. What"),
        ("T4", "8b", {}, "qlora", r"qlora, on a 4-bit base: LoRA on 16 bits needs 1[5-9].* over 85 % of 14.6 GiB"),
        ("T4", "1.7b", {}, "lora", "not measured at this size"),
        ("T4", "360m", {"method": "qlora"}, "qlora", ""),
        ("T4", "360m", {"init": "loftq"}, "qlora", "which init 'loftq' needs"),
        ("T4", "8b", {"init": "pissa", "plan_for": "A100-40"}, "lora", "which init 'pissa' needs"),
        ("T4", "360m", {"method": "full"}, "full", ""),
    ],
)
def test_auto_takes_a_16_bit_base_where_it_fits_with_room_and_says_why(card, size, given, method, said):
    made = plan({"batch_size": 8, "plan_for": card, **given}, LENGTHS, llama(size))
    assert made.method == method == made.as_dict()["method"] and made.setting.params.method == method
    assert ("Method auto" in str(made)) == bool(said) and re.search(said, " ".join(made.reasons))


def test_auto_leaves_room_on_the_gpu_and_in_host_memory():
    h200, cpu = cost_model.card_named("H200"), cost_model.CPU
    one = {"quantize": "none", "recompute": "none", "row_tokens": max(LENGTHS)}  # a single way to train
    for size, card in (("8b", h200), ("135m", cpu)):
        need = plan({"method": "lora", **one}, LENGTHS, llama(size), card=replace(card, total_gib=100)).option.need_gib
        for total, method in ((need / 0.84, "lora"), (need / 0.87, "qlora"), (need / 1.05, "qlora")):
            made = plan(one, LENGTHS, llama(size), card=replace(card, total_gib=total))
            assert made.method == method, (size, total)
        assert made.option.need_gib <= made.card.total_gib


def test_auto_takes_fp8_where_16_bits_leave_no_room_and_it_was_measured():
    h100, l4 = (cost_model.card_named(name) for name in ("H100", "L4"))
    for card, quantize in ((h100, "fp8"), (l4, "nf4")):
        made = plan({}, LENGTHS, llama("8b"), card=replace(card, total_gib=16))
        assert made.setting.quantize == quantize and made.option.need_gib <= 16
        assert ("16 bits, by quantize 'none'" in " ".join(made.reasons)) == (quantize == "fp8")
    kept = {"quantize": "auto", "init": "loftq"}
    assert plan(kept, LENGTHS, llama("8b"), card=replace(h100, total_gib=16)).setting.quantize == "nf4"
    sizes = {"num_local_experts": 8, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 16}
    experts = plan({"batch_size": 256}, LENGTHS, MixtralConfig(**sizes), card=h100)
    assert experts.setting.quantize == "none" and "quantize 'fp8'" not in " ".join(experts.reasons)
    small = plan({"batch_size": 8}, LENGTHS, llama("135m"), card=h100)
    assert small.setting.quantize == "none", "launches decide there"


def test_packed_sequences_are_planned_window_by_window_and_their_fill_is_said():
    draw = random.Random(3)
    lengths = [draw.randint(20, 900) for _ in range(2 * row_plan.WINDOW + 100)]
    steps = row_plan.Batches(4, "packed", 1024).epoch(lengths, 17, 0)
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in step) for step in steps) <= 4 * 1024
    assert steps == row_plan.Batches(4, "packed", 1024).epoch(lengths, 17, 0)
    few = lengths[:3000]
    made = plan({"batch_size": 4, "batch_unit": "packed", "plan_for": "H100"}, few, llama("360m"), sequence=1024)
    full = sum(few) / (1024 * 4 * made.steps)
    assert 0.9 < full <= 1 and f"The packed sequences are {display.percent(full)} full;" in " ".join(made.reasons)
    rows = plan({"batch_size": 8, "plan_for": "H100"}, few, llama("360m"))
    assert "packed sequences" not in " ".join(rows.reasons)
