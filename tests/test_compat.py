"""What helpers.compat reaches into is still there, in the versions that it was read in."""

import importlib.metadata
import inspect
import logging

import pytest

from helpers import compat


@pytest.fixture(scope="module")
def wrapped():
    """A tiny Llama on the CPU with a plain LoRA adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora).train()


def test_the_versions_are_those_that_were_read():
    for package, version in compat.CHECKED.items():
        try:
            assert importlib.metadata.version(package) == version, package
        except importlib.metadata.PackageNotFoundError:  # liger-kernel, on machines without a GPU
            continue


def test_peft_lora_layers_have_what_the_fused_forward_reads(wrapped):
    (first, _) = layers = [layer for _, layer in compat.lora_linears(wrapped)]
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Linear"]
    assert compat.plain_adapter(first) == "default" and first.scaling["default"] == 4.0
    with wrapped.disable_adapter():
        assert compat.plain_adapter(first) == ""
    first.lora_dropout["default"].p = 0.1
    first.lora_B["default"].bias = first.lora_B["default"].weight
    assert compat.plain_adapter(first) == ""
    first.lora_B["default"].bias = None


def test_peft_merges_one_layer_at_a_time(wrapped):
    import torch

    modules = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules()}
    layer = modules["model.layers.0.self_attn.q_proj"]
    assert compat.adapted(wrapped)["model.layers.0.self_attn.q_proj.weight"] is layer
    before = layer.base_layer.weight.detach().clone()
    merged = compat.merged_weight(layer, torch.zeros_like(before))
    change = 4.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(merged, before + change, atol=1e-6) and not layer.merged
    assert torch.equal(layer.base_layer.weight, before), "the layer is as it was"


def test_transformers_layers_run_through_the_function_that_they_are_given(wrapped):
    import torch

    layers = wrapped.get_base_model().model.layers
    seen = []

    def run(forward, *args):
        seen.append(len(args))
        return forward(*args)

    compat.checkpoint_layer(layers[1], run)
    wrapped(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    compat.checkpoint_layer(layers[1], None)
    wrapped(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    assert seen == [1], "the hidden states alone come by position"


def test_bitsandbytes_repacks_only_where_it_is_let():
    import torch
    from bitsandbytes.nn import Linear4bit

    layer = torch.nn.Sequential(Linear4bit(64, 64))
    assert hasattr(layer[0], "support_avx512bf16_for_cpu")
    layer[0].support_avx512bf16_for_cpu = True
    compat.keep_four_bit_layout(layer)
    assert not layer[0].support_avx512bf16_for_cpu


def test_liger_takes_the_arguments_by_the_places_that_are_given():
    function = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    names = [*inspect.signature(function.LigerFusedLinearCrossEntropyFunction.forward).parameters]
    wanted = ["ctx", "_input", "weight", "target", "bias", "ce_weight", "ignore_index", "lse_square_scale"]
    assert names[:10] == [*wanted, "label_smoothing", "reduction"]
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    assert {"llama", "qwen2", "qwen3", "mistral"} <= MODEL_TYPE_TO_APPLY_LIGER_FN.keys()


def test_trainers_private_methods_have_the_arguments_that_are_overridden():
    from transformers import Trainer

    for name, arguments in (
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
    ):
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == arguments


def test_trl_prepares_rows_in_the_method_that_is_overridden():
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    for trainer in (DPOTrainer, KTOTrainer):
        assert "_prepare_dataset" in vars(trainer)
        assert "self._prepare_dataset(train_dataset" in inspect.getsource(trainer.__init__)
    for trainer in (ORPOTrainer, CPOTrainer):
        assert list(inspect.signature(trainer.tokenize_row).parameters)[:2] == ["self", "feature"]
        assert "_stored_metrics" in inspect.getsource(trainer.__init__)


def test_trainer_arguments_keep_their_gpus_where_one_is_set(tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments._n_gpu = 3
    assert arguments.n_gpu == 3 and compat.use_one_gpu(arguments).n_gpu == 1


def test_accelerate_has_the_state_that_sharding_sets():
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    assert "mixed_precision_policy" in inspect.signature(FullyShardedDataParallelPlugin).parameters
    assert "distributed_type" in inspect.getsource(PartialState) and "fsdp_plugin" in inspect.getsource(
        AcceleratorState
    )


def test_liger_is_told_not_to_list_the_backends_that_are_not_installed():
    assert not logging.getLogger("liger_kernel.backends.registry").isEnabledFor(logging.WARNING)


def test_a_new_adapter_on_a_base_without_storage_begins_with_the_values_that_it_has_on_any_other(narrow_llama):
    import torch
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model

    from helpers.model import loading

    def adapter(model, apart):
        torch.manual_seed(1)
        with compat.adapters_off_meta(apart):
            wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        return {name: weight for name, weight in wrapped.named_parameters() if "lora" in name}

    config = loading.load_config(narrow_llama)
    with init_empty_weights(include_buffers=False):
        empty = loading.auto_class(config).from_config(config, dtype=torch.bfloat16)
    made, ought = adapter(empty, True), adapter(loading.load_model(narrow_llama, dtype="bf16", device="cpu"), False)
    assert made.keys() == ought.keys() and all(torch.equal(made[name], ought[name]) for name in ought)
    assert all(weight.is_meta for name, weight in empty.named_parameters() if "lora" not in name)


def test_liger_leaves_experts_alone():
    """Its kernel for experts would be bound to PEFT's wrapper around them, which has none of their attributes."""
    pytest.importorskip("liger_kernel.transformers.monkey_patch", exc_type=ImportError)
    import peft
    import transformers

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8, "num_attention_heads": 1}
    more = {"num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**size, **more))
    adapter = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=["q_proj"])
    model = peft.get_peft_model(base, adapter).get_base_model()
    assert "activation" not in compat.liger_kernels(model)
    layer = model.model.layers[0]
    assert "forward" not in vars(layer.mlp.experts) and "forward" in vars(layer.input_layernorm)
