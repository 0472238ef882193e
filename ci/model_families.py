"""Tiny random models of the families that people tune: made from a config alone, offline, a second each.

A family is a transformers `model_type` with the settings that make it what it is (experts, a window shorter than a row,
states beside attention), two to six layers, and a hidden size of 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.1}
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 24}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
SIXTH = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"], **WINDOW}
FOURTH = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], **WINDOW}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPS |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, **HEAD}
LINEAR |= {"linear_value_head_dim": 16, "num_hidden_layers": 4}
LINEAR |= {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
INDEXED = {"index_topk": 2048, "index_head_dim": 16, "index_n_heads": 2}
FIRST_DENSE = {"mlp_layer_types": ["dense"] + ["sparse"] * 3}
SHARED = {"shared_expert_intermediate_size": 32, "num_attention_heads_per_layer": [4, 4], **SLIDING}
SHARED |= {"mlp_layer_types": ["dense", "sparse"]}
FEW = {"num_experts_per_tok": 2}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
SECTIONS |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 600, "num_kv_shared_layers": 2}

# name: (model_type, settings besides SIZE). Where a window is set, rows of the test data are longer than it.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("llama", {"num_key_value_heads": 4}),
    "Llama 3": ("llama", {"rope_theta": 500000.0}),
    "Llama 3.1": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
                "rope_theta": 500000.0,
            }
        },
    ),
    "Llama 3.2": ("llama", {"tie_word_embeddings": True, **HEAD}),
    "Llama 4 text": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "num_hidden_layers": 4,
            **HEAD,
        },
    ),
    "Mistral": ("mistral", {**WINDOW, **HEAD}),
    "Ministral": ("ministral", {**SLIDING, **HEAD}),
    "Ministral 3": ("ministral3", {**HEAD, "sliding_window": None}),
    "Mistral Small 3 text": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, **FEW, "sliding_window": None}),
    "Qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "Qwen2.5": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "Qwen2 MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3": ("qwen3", HEAD),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, **FEW, "moe_intermediate_size": 32, "norm_topk_prob": True, **HEAD}),
    "Qwen3-Next": ("qwen3_next", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3.5 text": ("qwen3_5_text", {**LINEAR, "rope_parameters": SECTIONS}),
    "Gemma 2": ("gemma2", {**HEAD, "query_pre_attn_scalar": 16, **WINDOW}),
    "Gemma 3": ("gemma3_text", {**SIXTH, **HEAD, "query_pre_attn_scalar": 16}),
    "Gemma 3n text": (
        "gemma3n_text",
        {
            **HEAD,
            **PER_LAYER,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "laurel_rank": 8,
            "altup_num_inputs": 4,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            **WINDOW,
        },
    ),
    "Gemma 4 text": (
        "gemma4_text",
        {**HEAD, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, **SLIDING},
    ),
    "Phi-3": ("phi3", WINDOW),
    "Phi-4": ("phi3", {"sliding_window": None}),
    "Phi-4-mini": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True, "sliding_window": None}),
    "Granite 3": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 6.0}),
    "Granite 3 MoE": ("granitemoe", {"num_local_experts": 4, **FEW, "logits_scaling": 2.0}),
    "Granite 4": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
        },
    ),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            **FEW,
            "shared_intermediate_size": 32,
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "logits_scaling": 2.0,
        },
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", FOURTH),
    "OLMoE": ("olmoe", {"num_experts": 4, **FEW, "num_key_value_heads": 4}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "Cohere 2": ("cohere2", {"logit_scale": 0.25, **FOURTH, **HEAD}),
    "Falcon-H1": (
        "falcon_h1",
        {**MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, **HEAD},
    ),
    "Mamba 2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32, "intermediate_size": 128},
    ),
    "Nemotron-H": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            **HEAD,
        },
    ),
    "Bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "Jamba": (
        "jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "num_experts": 4,
            **FEW,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {**GROUPS, **LATENT, "q_lora_rank": None, "num_key_value_heads": 4, "topk_method": "greedy", "head_dim": 8},
    ),
    "DeepSeek-V3": ("deepseek_v3", {**GROUPS, **LATENT, "num_key_value_heads": 4}),
    "GLM-4": ("glm4", HEAD),
    "GLM-4.5": ("glm4_moe", {**GROUPS, **HEAD}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, **FEW, **HEAD, **SLIDING}),
    "Ernie 4.5": ("ernie4_5", HEAD),
    "Ernie 4.5 MoE": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "Hunyuan": ("hunyuan_v1_dense", HEAD),
    "Hunyuan MoE": (
        "hunyuan_v1_moe",
        {
            **HEAD,
            "num_experts": 4,
            "moe_topk": [2] * 2,
            "moe_intermediate_size": [96] * 2,
            "num_shared_expert": [1] * 2,
        },
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "LFM2 MoE": (
        "lfm2_moe",
        {
            "layer_types": ["conv", "full_attention"],
            "num_experts": 4,
            **FEW,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
        },
    ),
    "StableLM": ("stablelm", {"partial_rotary_factor": 0.25}),
    "StarCoder 2": ("starcoder2", WINDOW),
    "GPT-2": ("gpt2", {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.25}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "EXAONE 4": ("exaone4", FOURTH),
    "Apertus": ("apertus", {}),
    "Seed-OSS": ("seed_oss", HEAD),
    "MiniMax-M2": ("minimax_m2", {**HEAD, "num_local_experts": 4, **FEW, "rotary_dim": 16}),
    "Kimi-Linear": (
        "kimi_linear",
        {
            **GROUPS,
            **LATENT,
            "num_key_value_heads": 4,
            "num_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_heads": 4,
            "linear_head_dim": 16,
        },
    ),
    "nanochat": ("nanochat", {}),
    "Bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Falcon": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "MPT": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048, "expansion_ratio": 2}),
    "AFMoE": (
        "afmoe",
        {**FOURTH, **HEAD, **EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1, "mup_enabled": True},
    ),
    "Arcee": ("arcee", {}),
    "BioGPT": ("biogpt", {}),
    "BitNet": ("bitnet", {}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "DBRX": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 2048,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    "DeepSeek-V3.2": ("deepseek_v32", {**GROUPS, **LATENT, **INDEXED, "num_key_value_heads": 4}),
    "dots.llm1": ("dots1", {**GROUPS, **HEAD, "num_key_value_heads": 4}),
    "EXAONE MoE": (
        "exaone_moe",
        {**FOURTH, **EXPERTS, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, **FIRST_DENSE},
    ),
    "Falcon Mamba": ("falcon_mamba", {"state_size": 8, "intermediate_size": 128}),
    "FlexOlmo": ("flex_olmo", {"num_experts": 4, **FEW}),
    "Gemma": ("gemma", HEAD),
    "GLM": ("glm", HEAD),
    "GLM-4.7 Flash": ("glm4_moe_lite", {**GROUPS, **LATENT, "num_key_value_heads": 4}),
    "GPT-BigCode": ("gpt_bigcode", {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "GPT-J": ("gptj", {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "Granite with sinks": ("granite_swa", WINDOW),
    "Granite 3 MoE shared": ("granitemoeshared", {"num_local_experts": 4, **FEW, "shared_intermediate_size": 32}),
    "Helium": ("helium", HEAD),
    "JetMoE": ("jetmoe", {"num_local_experts": 4, **FEW, "kv_channels": 16}),
    "Laguna": ("laguna", {**HEAD, **EXPERTS, **SHARED}),
    "LongCat-Flash": (
        "longcat_flash",
        {
            **LATENT,
            "num_layers": 1,
            "ffn_hidden_size": 96,
            "n_routed_experts": 4,
            "zero_expert_num": 1,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 32,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
    ),
    "Mamba": ("mamba", {"state_size": 8, "intermediate_size": 128}),
    "MiniMax": (
        "minimax",
        {**HEAD, **FEW, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "ModernBERT decoder": ("modernbert-decoder", {"local_attention": 24, "layer_types": SLIDING["layer_types"]}),
    "Nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "OLMo": ("olmo", {"clip_qkv": 8.0}),
    "OLMo hybrid": ("olmo_hybrid", {**LINEAR, "linear_num_key_heads": 4}),
    "Persimmon": ("persimmon", {"partial_rotary_factor": 0.5}),
    "Phi-2": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 256}),
    "Phi-3.5 MoE": ("phimoe", {"num_local_experts": 4, **FEW, "lm_head_bias": True}),
    "Qwen3.5 MoE text": (
        "qwen3_5_moe_text",
        {**LINEAR, **EXPERTS, "rope_parameters": SECTIONS, "shared_expert_intermediate_size": 32},
    ),
    "RWKV": ("rwkv", {"attention_hidden_size": 64}),
    "VaultGemma": ("vaultgemma", {**HEAD, **WINDOW, "query_pre_attn_scalar": 16}),
    "XGLM": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    "Zamba 2": (
        "zamba2",
        {
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 32,
        },
    ),
}

# What llama.cpp has fixed in its code for a family, in whose place the tiny model above has something shorter.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 4 text": {"attention_chunk_size": 8192},
    "Gemma 3n text": {
        "hidden_size_per_layer_input": 256,
        "num_hidden_layers": 30,
        "num_kv_shared_layers": 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 6,
        "intermediate_size": [96] * 30,
        "activation_sparsity_pattern": [0.0] * 30,
        "laurel_rank": 64,
    },
    "DeepSeek-V2-Lite": {"num_hidden_layers": 27},
    "EXAONE 4": {
        "num_hidden_layers": 64,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
        "initializer_range": 0.05,
    },
}

# Of every family with a cell that is not as it ought to be: why.
REASONS: dict[str, str] = {
    "Qwen2": "its GGUF needs Qwen2's own tokenizer, which transformers gives every folder of this type.",
    "Qwen2.5": "as Qwen2.",
}


def config_of(family: str, **more: Any) -> Any:
    """The transformers config of a family's tiny model; more: settings besides, the vocabulary's size first."""
    from transformers import AutoConfig

    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**SIZE, "vocab_size": 600, "pad_token_id": 0, **settings, **more})


def make(family: str, folder: Path, tokenizer: Any, **more: Any) -> Path:
    """The family's model with random weights and `tokenizer` in `folder`; more: as `config_of` takes it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    known = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = config_of(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **known, **more)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.dim() == 2 and not w.any() and min(w.shape) > 1):
            weight.normal_(0, 0.1)  # a router of zeros leaves it to the order of ties which experts answer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if hasattr(tokenizer, "spm_file"):
        (folder / "tokenizer.model").write_bytes(Path(tokenizer.spm_file).read_bytes())
    return folder
