"""Shared parts of the tests: the real tokenizer and model, a small random model, places to write."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import settings

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub; one that talks to a hub of its own says so itself
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TUNEBOOK_SERVER_KEY", "key-of-the-tests")  # the proxies of the tests know it
# The same examples for the same code: a commit passes or fails, never both. TUNEBOOK_EXAMPLES=random looks further.
settings.register_profile("same", derandomize=True)
settings.register_profile("random", print_blob=True)
settings.load_profile(os.environ.get("TUNEBOOK_EXAMPLES", "same"))
if workers := os.environ.get(
    "PYTEST_XDIST_WORKER_COUNT"
):  # before torch is imported: threads of two workers that wait for each other spin
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# The files that take longest, longest first: started first, they leave no worker alone at the end.
SLOWEST = ("test_twice", "test_pipeline", "test_preference", "test_resume", "test_pipeline_stopped", "test_sft")
SLOWEST += ("test_recipes", "test_distributed", "test_fidelity", "test_export", "test_bases")


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOWEST)))


def begun(name, params):
    """A stage's folder with the work begun, whether it is finished already or not."""
    from helpers import runs

    stage = runs.stage(name, params)
    stage.begin()
    return stage


@pytest.fixture(scope="session")
def smollm2():
    """The default model's files (a ModelSource)."""
    from helpers.model.loading import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from helpers.model.loading import load_tokenizer

    return load_tokenizer(smollm2)


def random_llama(folder, tokenizer, **size):
    """A random two-layer Llama with SmolLM2's tokenizer in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{"tie_word_embeddings": True, **size},
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tokenizer, tmp_path_factory):
    """Folder of a random Llama of width 256, which K-quants need; 13 M parameters, mostly embeddings."""
    return random_llama(tmp_path_factory.mktemp("tiny_llama"), tokenizer, hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="session")
def narrow_llama(tokenizer, tmp_path_factory):
    """Folder of a random Llama of width 64, to be trained: its arithmetic is a quarter of tiny_llama's."""
    return random_llama(
        tmp_path_factory.mktemp("narrow_llama"),
        tokenizer,
        hidden_size=64,
        intermediate_size=128,
        initializer_range=0.08,
    )


@pytest.fixture
def untied_llama(tokenizer, tmp_path):
    """The same with an output head of its own, as larger models have: sharding puts it into a group of its own."""
    return random_llama(
        tmp_path / "untied",
        tokenizer,
        hidden_size=64,
        intermediate_size=128,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A short run of all five notebooks for all workers, not to be changed: (finished command, folder of runs)."""
    import short_run

    base = tmp_path_factory.getbasetemp()
    return short_run.shared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole_run")


@pytest.fixture
def runs_root(tmp_path, monkeypatch):
    """An empty folder that holds this test's runs."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("TUNEBOOK_RUNS", str(folder))
    return folder


@pytest.fixture
def data(runs_root, narrow_llama, tokenizer):
    """The manifest of run "r"'s finished data stage, for training the small model."""
    import train_data

    return train_data.data_stage("r", narrow_llama, tokenizer)


@pytest.fixture(scope="session")
def demo_data():
    """LLaMA-Factory's demo sets, where a copy lies beside the checkout."""
    folder = PROJECT.parent / "shared" / "data" / "llama_factory_demo"
    if not folder.is_dir():
        pytest.skip("LLaMA-Factory's demo sets are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def chromium():
    """Path of a Chromium that playwright can drive."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def server(smollm2):
    """llama.cpp's real server on the default model."""
    from helpers.gguf.runner import Server
    from helpers.model import offline

    with Server(offline.wheel_gguf(), parallel=2, context=1024) as running:
        yield running


@pytest.fixture
def proxy(server):
    """A proxy before it that counts what is asked."""
    from llm_proxy import Proxy

    made = Proxy(server.url)
    yield made
    made.shutdown()
    made.server_close()
