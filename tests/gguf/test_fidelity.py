"""The exported file is the model: converted, quantised and run by llama.cpp's own code, with real tokenizers."""

import ctypes
import json
import shutil
import signal
from contextlib import closing

import gguf_models
import numpy as np
import pytest

from helpers.errors import TunebookError
from helpers.gguf import convert, fidelity, header, libraries, preflight, trained
from helpers.gguf.llama_cpp import LlamaCpp
from helpers.gguf.runner import GgufModel, Server

TEXT = "SELECT name FROM lakes WHERE depth_m > 100 ORDER BY name; -- 最深的湖 and naïve façades, 12345 of them\n"
WANTED = {
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q5_k_s": "Q5_K",
    "q4_k_m": "Q4_K",
    "q4_k_s": "Q4_K",
    "q4_0": "Q4_0",
    "q3_k_m": "Q3_K",
    "q3_k_s": "Q3_K",
    "q2_k": "Q2_K",
}


@pytest.fixture(scope="module")
def f16(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model-f16.gguf"
    convert.convert(tiny_llama, path)
    return path


@pytest.fixture(scope="module")
def q8(f16):
    return convert.quantize(f16, f16.with_name("q8.gguf"), "q8_0").path


@pytest.fixture(scope="module")
def reference(tiny_llama, tokenizer, tmp_path_factory):
    made = fidelity.Reference(
        tiny_llama,
        [tokenizer(TEXT * 3)["input_ids"]],
        [tokenizer(TEXT)["input_ids"]],
        max_tokens=8,
        work=tmp_path_factory.mktemp("reference"),
    )
    yield made
    made.close()


def tensors(path):
    from gguf import GGUFReader

    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def test_every_type_is_really_that_type_and_smaller_than_the_last(f16, tmp_path):
    sizes = []
    for kind, wanted in WANTED.items():
        made = convert.quantize(f16, tmp_path / f"{kind}.gguf", kind)
        assert made.types.get(wanted, 0) >= 6
        sizes.append(made.bytes)
    assert sizes[0] < f16.stat().st_size and sizes == sorted(sizes, reverse=True)


def test_f16_passes_every_gate(reference, f16):
    result = fidelity.measure(reference, f16, "f16")
    assert not result.failed and result.mean_kl < 1e-5 and result.top1 == 1
    assert {"system and question", "several turns", "accents and emoji", "Chinese"} <= set(
        result.prompt_shapes
    ) and result.token_texts > 30
    fidelity.require([result])


def test_what_the_weights_cost_is_told_from_what_the_runtime_costs(tiny_llama, tokenizer, f16, tmp_path):
    """The two files have the same weights, so those of q8_0 must come out far closer, whatever llama.cpp computes."""
    with closing(fidelity.Reference(tiny_llama, [tokenizer(TEXT)["input_ids"]], work=tmp_path)) as made:
        found = {}
        for kind in ("q4_k_m", "q8_0"):
            file = convert.quantize(f16, tmp_path / f"{kind}.gguf", kind).path
            weights = made.weights_kl(file, f16)
            found[kind] = fidelity.measure(made, file, kind, weights)
        assert 0 < found["q8_0"].weights_kl < 0.1 * found["q4_k_m"].weights_kl
        for result in found.values():
            assert result.weights_kl == pytest.approx(result.mean_kl, rel=0.5) and result.runtime_kl >= 0
        assert made.weights_kl(f16, f16) is not None  # nothing in it is quantised: nothing to lay over


@pytest.mark.parametrize(
    ("kind", "cost", "kl", "passes"),
    [
        ("q4_k_m", 0.0784, 0.0880, True),  # SmolLM2-135M on 1,000 tokens
        ("q8_0", 0.0035, 0.0107, True),  # and on 100
        ("q4_k_m", 0.02, 0.028, True),  # what an 8B model loses
        ("q4_k_m", 0.02, 0.09, False),  # a file that is not it, within the small model's 0.25
        ("q8_0", 0.0003, 0.018, False),
        ("q4_k_m", None, 0.09, True),
        ("q2_k", 3.0, 2.5, False),  # never more than the type may cost a small model
        ("f16", None, 2e-4, False),
    ],
)
def test_the_budget_follows_what_the_types_own_weights_cost_this_model(kind, cost, kl, passes):
    result = fidelity.Result(kind, weights_kl=cost, mean_kl=kl)
    most, least = fidelity.budget(result)
    assert (kl <= most) == passes
    assert convert.TYPES[kind].top1 <= least < 1


def edit(path, out, **fields):
    """A copy of a GGUF file with text metadata replaced by text of the same length."""
    data = path.read_bytes()
    for old, new in fields.values():
        assert old in data and len(old) == len(new)
        data = data.replace(old, new)
    out.write_bytes(data)
    return out


def test_each_broken_gate_is_named(reference, f16, tmp_path):
    template = edit(f16, tmp_path / "template.gguf", a=(b"<|im_start|>assistant\n", b"<|im_start|>Assistant\n"))
    merges = edit(f16, tmp_path / "merges.gguf", a=("Ġ t".encode(), "Ġ \u007f".encode()))
    weights = tmp_path / "weights.gguf"
    data = bytearray(f16.read_bytes())
    at = next(t for t in header.check(f16).tensors if "ffn_down" in t.name)
    noise = np.random.default_rng(0).normal(0, 1, at.n_elements).astype(np.float16)
    data[at.data_offset : at.data_offset + at.n_bytes] = noise.tobytes()
    weights.write_bytes(data)
    for path, gate in ((template, "prompt"), (merges, "token ids"), (weights, "logits")):
        result = fidelity.measure(reference, path, "f16")
        assert gate in result.failed, path
        with pytest.raises(TunebookError, match=f"f16: .*{gate}"):
            fidelity.require([result])


def altered(path, out, layer=None, **fields):
    """A copy of a GGUF file with other numbers in its header, and noise in the weights of a tensor."""
    from gguf import GGUFReader

    out.write_bytes(path.read_bytes())
    reader = GGUFReader(out, "r+")
    for name, value in fields.items():
        field = reader.get_field(name.replace("__", "."))
        field.parts[field.data[0]][0] = value
    for tensor in (t for t in reader.tensors if t.name == layer):
        draw = np.random.default_rng(0)
        if tensor.data.dtype == np.float16:
            spread = np.abs(tensor.data).mean()
            tensor.data[:] += draw.normal(0, spread, tensor.data.shape).astype(np.float16)
        else:
            tensor.data[: len(tensor.data) // 2] = tensor.data[len(tensor.data) // 2 :][: len(tensor.data) // 2]
    reader.data.flush()
    return out


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_a_broken_model_is_named_by_its_gate_however_small_the_file(kind, tokenizer, tmp_path):
    """Weights of one layer and the rotary embedding's base: in 4 bits, too, where the bound of the type alone lets a
    KL of 0.25 pass."""
    folder, f16 = gguf_models.make("llama", tmp_path / "model", tokenizer), tmp_path / "f16.gguf"
    convert.convert(folder, f16)
    whole = f16 if kind == "f16" else convert.quantize(f16, tmp_path / "q4.gguf", kind).path
    layer = altered(whole, tmp_path / "layer.gguf", "blk.0.ffn_down.weight")
    rope = altered(whole, tmp_path / "rope.gguf", llama__rope__freq_base=50.0)
    with closing(fidelity.Reference(folder, [tokenizer(TEXT)["input_ids"]], work=tmp_path)) as reference:
        for path in (whole, layer, rope):
            cost = None if kind == "f16" else reference.weights_kl(path, f16)
            result = fidelity.measure(reference, path, kind, cost)
            assert ("blk.0.ffn_down.weight" in result.failed.get("weights", "")) == (path == layer and kind != "f16")
            far = result.mean_kl > fidelity.budget(result)[0]  # noise has no first choice that rounding would keep
            assert far == (path != whole) or (path == layer and kind != "f16"), (path.name, result.mean_kl, cost)
            assert not far or "logits" in result.failed
        assert fidelity.budget(result)[0] <= convert.TYPES[kind].kl


def test_a_truncated_or_foreign_file_is_refused_with_a_sentence(f16, tmp_path):
    data = f16.read_bytes()
    for name, content, words in (
        ("cut.gguf", data[: len(data) // 2], "truncated"),
        ("head.gguf", data[:60000], "not a readable GGUF"),
        ("text.gguf", b"hello" * 100, "does not begin"),
        ("huge.gguf", data[:8] + b"\xff" * 16 + data[24:], "announces"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TunebookError, match=words):
            LlamaCpp(tmp_path / name)
    with pytest.raises(TunebookError, match="There is no file"):
        LlamaCpp(tmp_path / "none.gguf")


def test_what_llama_cpp_itself_says_stands_in_the_message(f16, tmp_path):
    foreign = edit(f16, tmp_path / "foreign.gguf", a=(b"llama", b"xlama"))
    for use in (
        lambda: LlamaCpp(foreign),
        lambda: Server(foreign),
        lambda: GgufModel(foreign),
        lambda: convert.quantize(foreign, tmp_path / "q8.gguf", "q8_0"),
    ):
        with pytest.raises(TunebookError, match="unknown model architecture: 'xlama'"):
            use()


def test_a_full_disk_leaves_no_partial_file_and_the_same_call_then_succeeds(f16, tmp_path):
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this machine does not allow a small file system for the test")
    try:
        with pytest.raises(TunebookError, match="disk"):
            convert.quantize(f16, small / "q8.gguf", "q8_0")
        assert not list(small.iterdir())
        subprocess.run(["mount", "-o", "remount,size=200m", str(small)], check=True)
        assert convert.quantize(f16, small / "q8.gguf", "q8_0").path.is_file()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_unknown_types_and_outputs_are_refused():
    with pytest.raises(TunebookError, match="q9_k"):
        convert.parse_types("q8_0, q9_k")
    assert convert.parse_types(" Q4_K_M,q8_0,q8_0") == ["q4_k_m", "q8_0"]


def test_batched_answers_share_a_prefix_and_equal_single_ones(f16, tokenizer):
    prompts = [tokenizer(TEXT * 2 + tail)["input_ids"] for tail in ("one", "two and more", "three")]
    with LlamaCpp(f16, parallel=2) as runtime:
        together = sorted(runtime.generate(prompts, max_tokens=6))
        assert [index for index, *_ in together] == [0, 1, 2]
        for index, *answer in together:
            assert answer[1:] == [6, False]
            assert list(runtime.generate([prompts[index]], max_tokens=6)) == [(0, *answer)]


def apply_adapter(runtime, path):
    """As `llama-server --lora` does."""
    init, apply = runtime.lib.llama_adapter_lora_init, runtime.lib.llama_set_adapters_lora
    pointer = init.restype = ctypes.c_void_p
    init.argtypes = (pointer, ctypes.c_char_p)
    apply.argtypes = (pointer, ctypes.POINTER(pointer), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float))
    lora = (pointer * 1)(init(runtime._model, str(path).encode()))
    assert lora[0] and apply(runtime._ctx, lora, 1, (ctypes.c_float * 1)(1.0)) == 0


def test_an_adapter_gguf_over_its_base_is_the_adapter(tiny_llama, f16, tokenizer, tmp_path):
    import torch

    ids = tokenizer(TEXT)["input_ids"]
    settings = {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}}
    wanted = gguf_models.random_adapter(tiny_llama, tmp_path / "adapter", ids, **settings)
    path = convert.convert_adapter(tmp_path / "adapter", tiny_llama, f16, tmp_path / "adapter.gguf")
    with LlamaCpp(f16) as runtime:
        without = torch.tensor(np.concatenate(list(runtime.iter_logits(ids))))
        apply_adapter(runtime, path)
        with_adapter = torch.tensor(np.concatenate(list(runtime.iter_logits(ids))))
    near, far = (float(trained.divergence(wanted, x.log_softmax(-1)).mean()) for x in (with_adapter, without))
    assert near < 1e-3 < 0.01 < far
    gguf_models.random_adapter(tiny_llama, tmp_path / "dora", ids, use_dora=True)
    with pytest.raises(TunebookError, match="no place"):
        convert.convert_adapter(tmp_path / "dora", tiny_llama, f16, tmp_path / "dora.gguf")


def test_an_importance_matrix_changes_the_bytes_and_the_error(tiny_llama, f16, tokenizer, tmp_path):
    matrix = convert.importance(tiny_llama, f16, [tokenizer(TEXT * 4)["input_ids"]], tmp_path / "imatrix.gguf")
    plain = convert.quantize(f16, tmp_path / "plain.gguf", "q2_k")
    weighed = convert.quantize(f16, tmp_path / "weighed.gguf", "q2_k", matrix)
    before, after = tensors(plain.path), tensors(weighed.path)
    differing = [n for n in before if before[n] != after[n]]
    assert len(differing) >= 14 and plain.bytes == pytest.approx(weighed.bytes, rel=0.01)


def test_experts_are_weighed_by_what_the_router_sends_them(tokenizer, tmp_path):
    """Where an expert's inputs differ in size, weighing them makes a quantised model better than weighing the rest."""
    import torch
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "initializer_range": 0.15}
    config = transformers.Qwen3MoeConfig(**size, num_key_value_heads=2, vocab_size=len(tokenizer))
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.copy_(2 * (1.5 * torch.randn(64)).exp())
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    row = tokenizer(TEXT * 2)["input_ids"]
    source = convert.convert(tmp_path / "moe", tmp_path / "f16.gguf")
    matrix = convert.importance(tmp_path / "moe", source, [row], tmp_path / "imatrix.gguf")
    assert convert.weighed(source, matrix) == "imatrix weighs 14 of 14 matrices"
    found = libraries._read_importance(str(matrix))
    held = {name: np.array(t.data) for name, t in header.open_tensors(matrix).items()}
    seen = held["blk.0.ffn_down_exps.weight.counts"]
    assert seen.size == 4 and seen.sum() == 2 * len(row) and found["blk.0.ffn_down_exps.weight"].shape == (4 * 64,)
    rest = {n: a for n, a in held.items() if "_exps" not in n}
    header.write(tmp_path / "rest.gguf", "imatrix", "imatrix", {"imatrix.chunk_size": 512}, rest)
    assert "not blk.0.ffn_down_exps.weight" in convert.weighed(source, tmp_path / "rest.gguf")
    with closing(fidelity.Reference(tmp_path / "moe", [row], work=tmp_path)) as reference:
        kl = []
        for which in (matrix, tmp_path / "rest.gguf"):
            file = convert.quantize(source, tmp_path / "q.gguf", "q4_0", which).path
            kl.append(fidelity.measure(reference, file, "q4_0").mean_kl)
    assert kl[0] < 0.9 * kl[1], kl  # 0.272 and 0.327 nats


def test_preflight_says_yes_with_numbers_and_no_with_reasons(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = preflight.check(tiny_llama).require()
    assert not report.problems and report.needs["q4_k_m"][0] < report.needs["16-bit GGUF"][0] < report.disk_gib
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny_llama, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyKnowsForCausalLM"]}))
    with pytest.raises(TunebookError, match="does not know NobodyKnowsForCausalLM"):
        preflight.check(unknown).require()
    broken = tmp_path / "template"
    shutil.copytree(tiny_llama, broken)
    (broken / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ raise_exception('no') }}"
    )
    assert any("chat template" in p or "end of turn" in p for p in preflight.check(broken).problems)


LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gemma2", "layer_types": LAYERS[:2]}, "every 2th layer"),
        ({"model_type": "cohere2", "layer_types": LAYERS}, "every 4th layer"),
        ({"model_type": "exaone4", "layer_types": LAYERS[1:] + LAYERS[:1]}, "at 64 layers"),
        ({"model_type": "llama4_text", "attention_chunk_size": 32}, "chunks of 8,192"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 1]}, "all but every 4th"),
        ({"model_type": "mamba2", "n_groups": 8}, "over its 8 groups"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2}, "no Mamba layers"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_from_the_config_alone(config, why):
    with pytest.raises(TunebookError, match=why):
        convert._speak_to_converter(dict(config))


def test_a_form_that_llama_cpp_cannot_load_is_refused_and_a_lost_window_is_told(tokenizer, tmp_path):
    from ci import model_families

    lite = model_families.make("DeepSeek-V2-Lite", tmp_path / "lite", tokenizer)
    assert "no place for a model of this form" in " ".join(preflight.check(lite).problems)
    windowed = preflight.check(model_families.make("Mistral", tmp_path / "mistral", tokenizer))
    assert not windowed.problems and "24 tokens, and llama.cpp runs" in windowed.warnings[0]
    assert not preflight.check(model_families.make("Llama 3", tmp_path / "llama", tokenizer)).warnings


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_other_architectures_survive_the_whole_chain(architecture, tokenizer, tmp_path):
    chosen = tokenizer
    if architecture in ("gemma2", "qwen2"):
        lines = [
            TEXT,
            "def merge(base, adapter):",
            "    return the merged folder of the model",
            "Which lake is deepest?",
            "0 1 2 3 4 5 6 7 8 9",
        ] * 40
        chosen = gguf_models.sentencepiece_tokenizer(tmp_path / "tokenizer", lines)
    folder = gguf_models.make(architecture, tmp_path / "model", chosen)
    path = tmp_path / "f16.gguf"
    convert.convert(folder, path)
    rows = [chosen(TEXT)["input_ids"][:60]]
    q4 = convert.quantize(path, tmp_path / "q4.gguf", "q4_k_m")
    with closing(fidelity.Reference(folder, rows, [rows[0][:10]], max_tokens=4, work=tmp_path)) as made:
        result = fidelity.measure(made, path, "f16")
        weights = made.weights_kl(q4.path, path)
    if (
        architecture == "qwen2"
    ):  # transformers gives every Qwen2 folder Qwen2's own splitting of words, which this vocabulary was not made for
        assert set(result.failed) <= {"token ids", "prompt"}
        result.failed.clear()
    assert not result.failed and result.mean_kl < 1e-5
    assert q4.types["Q4_K"] >= 6
    assert weights > 0


def test_the_server_answers_on_loopback_and_ends(q8):
    import socket

    with Server(q8, context=256) as running:
        assert running.healthy() and running.url.startswith("http://127.0.0.1:")
        reply = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3})
        assert reply["usage"]["completion_tokens"] <= 3
        with pytest.raises(TunebookError, match=f"Port {running.port}"):
            Server(q8, port=running.port)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", running.port), timeout=1)
    with pytest.raises(TunebookError, match="There is no file"):
        Server("none.gguf")


def test_a_figure_that_is_no_number_is_null_in_json():
    kept = fidelity.Result("f16", mean_kl=float("nan"), p99_kl=float("inf"), top1=0.5).as_dict()
    assert kept["mean_kl"] is kept["p99_kl"] is None and kept["top1"] == 0.5 and kept["failed"] == {}


def test_the_recommendation_allows_for_chance_and_not_for_a_wide_divergence():
    def file(kind, megabytes, kl, score, count, **more):
        return fidelity.Result(kind, megabytes << 20, 4.5, mean_kl=kl, task_score=score, task_count=count, **more)

    def best(*results):
        return fidelity.recommend(results)["type"]

    small, wide, large = (
        file("q4_k_m", 100, 0.06, 0.5, 24),
        file("q2_k", 60, 0.8, 0.54, 24),
        file("q8_0", 140, 0.004, 0.58, 24),
    )
    assert best(small, wide, large) == "q4_k_m"
    assert best(file("q4_k_m", 100, 0.06, 0.5, 1000), large) == "q8_0"
    assert best(file("q4_k_m", 100, 0.06, 0.6, 24, failed={"top-1": "low"}), large) == "q8_0"
    assert best(file("q4_k_m", 100, 0.06, None, 0), file("q8_0", 140, 0.004, None, 0)) == "q4_k_m"
    figure = fidelity.figure([small, large])
    assert len(figure.axes) == 1 and "q8_0" in figure.alt


def test_an_own_build_quantises(f16, tmp_path, monkeypatch):
    built = tmp_path / "build" / "bin"
    built.parent.mkdir()
    monkeypatch.setenv(libraries.OWN_BUILD, str(built.parent))
    with pytest.raises(TunebookError, match="holds no libllama"):
        convert.quantize(f16, tmp_path / "q8.gguf", "q8_0")
    monkeypatch.delenv(libraries.OWN_BUILD)
    built.symlink_to(libraries.for_quantizing().parent)
    monkeypatch.setenv(libraries.OWN_BUILD, str(built.parent))
    assert libraries.for_quantizing().parent == built
    assert convert.quantize(f16, tmp_path / "q8.gguf", "q8_0").types["Q8_0"] >= 6


def test_a_disk_that_fills_up_in_the_conversion_is_said_and_nothing_is_left(tiny_llama, tmp_path, monkeypatch):
    """A limit on the size of files ends numpy's write as a full disk does: short."""
    import resource
    import subprocess

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    real = subprocess.run
    monkeypatch.setattr(convert.subprocess, "run", lambda *args, **more: real(*args, **more, preexec_fn=limited))
    with pytest.raises(TunebookError, match="No space left on the disk while converting"):
        convert.convert(tiny_llama, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
