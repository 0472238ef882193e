"""The converter's process: classes that load although their file names what gguf lacks, and weights tried by name."""

import subprocess
import sys

import pytest

from ci.model_families import config_of, make
from helpers.errors import TunebookError
from helpers.gguf import convert, libraries, preflight

CRASH = """llama_model_quantize: failed
/build/ggml/src/ggml.c:1234: GGML_ASSERT(n_expert > 0) failed
[New LWP 12345]
[Thread debugging using libthread_db enabled]
Using host libthread_db library "/lib/x86_64-linux-gnu/libthread_db.so.1".
warning: process 12 is already traced
0x00007f1 in __syscall_cancel_arch () from /lib/x86_64-linux-gnu/libc.so.6
#0  0x00007f1 in __syscall_cancel_arch () from /lib/x86_64-linux-gnu/libc.so.6
ptrace: Operation not permitted.
No stack.
The program is not being run."""


def test_all_text_architectures_load_and_those_that_gguf_lacks_are_refused_by_name():
    """In one process, as importing the converter takes seconds: its own map, through the body of the process."""
    script = f"""
import sys
sys.argv = ["x", {str(libraries.converter())!r}, "--help"]
sys.path.insert(0, "")
import runpy
from pathlib import Path
body = runpy.run_path({str(convert.__file__).replace("convert.py", "converter_process.py")!r})
try:
    body["main"]()
except SystemExit:
    pass
import conversion
refused = []
for name in conversion.TEXT_MODEL_MAP:
    try:
        conversion.get_model_class(name)
    except (SystemExit, KeyError):  # two of speech are in the map and in no file
        refused.append(name)
print("REFUSED", *refused)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert said, done.stderr[-2000:]
    refused = said[0].split()[1:]
    assert "LagunaForCausalLM" in refused and len(refused) < 10
    wanted = {"DeepseekV3ForCausalLM", "Glm4ForCausalLM", "Mistral3ForConditionalGeneration", "MiniMaxM2ForCausalLM"}
    assert not wanted & set(refused)


def test_preflight_tries_the_names_of_the_weights(tokenizer, tmp_path):
    """A tensor that the converter has no name for is found before training."""
    from safetensors.torch import load_file, save_file

    folder = make("Llama 3.2", tmp_path / "model", tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.odd.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    problems = preflight.check(folder).problems
    assert problems and "odd" in problems[0]
    with pytest.raises(TunebookError, match="odd"):
        convert.convert(folder, tmp_path / "out.gguf")


def test_a_crash_of_llama_cpp_is_told_in_its_own_words():
    said = str(libraries.failure("quantising x to q4_0", CRASH))
    assert "GGML_ASSERT(n_expert > 0) failed" in said
    assert not any(word in said for word in ("ptrace", "No stack", "LWP", "libthread", "not being run", "#0"))


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("DeepSeek-V3", {"scoring_func": "sigmoid"}),
        ("Granite 4 hybrid", {"layer_types": ["mamba", "attention"]}),
        ("Nemotron-H", {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3}),
        ("Qwen3-Next", {"full_attention_interval": 4}),
        ("GPT-NeoX", {"rotary_pct": 0.25}),
        ("Bamba", {"attn_rotary_emb": 8}),
    ],
)
def test_the_converter_is_told_what_transformers_5_leaves_out_of_a_config(family, told):
    config = config_of(family).to_dict()
    convert._speak_to_converter(config)
    assert {name: config[name] for name in told} == told
    own = {**config, **dict.fromkeys(("scoring_func", "full_attention_interval", "rotary_pct"), 4)}
    own["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    convert._speak_to_converter(own)
    assert (own["scoring_func"], own["full_attention_interval"], own["rotary_pct"]) == (4, 4, 4), "its own words stay"


def test_layers_in_an_order_that_llama_cpp_has_no_place_for_are_refused():
    config = config_of("Qwen3-Next").to_dict()
    config["layer_types"] = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    with pytest.raises(TunebookError, match="full attention in every n-th layer alone, and this model's layers are"):
        convert._speak_to_converter(config)
