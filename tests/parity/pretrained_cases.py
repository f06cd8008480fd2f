"""The tiny models of pretrained.py: a class of transformers and its config for every family and its options."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        architecture: a class of transformers.
        fields: of its config.
        options: of the class, beside the config.
        left_out: tensors that Attnax neither reads nor writes.
        norm_mean: of the norms' weights.
        untied: the head is not tied, although the config of transformers 5 cannot say so.
        gradients: whether they are stored too.
        shard_size: of the files, in transformers' words.
        dtype: of the tensors in the files.
    """

    architecture: str
    fields: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    norm_mean: float = 1.0
    untied: bool = False
    gradients: bool = False
    shard_size: str = "1GB"
    dtype: torch.dtype = torch.float32


DECODER = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 67,
    "pad_token_id": 3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 3.0,
    "beta_fast": 5.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 19,
}
ENCODER = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 23,
    "layer_norm_eps": 1e-2,
    "pad_token_id": 3,
}
DISTILBERT = {"vocab_size": 61, "dim": 30, "hidden_dim": 37, "n_layers": 2, "n_heads": 5, "max_position_embeddings": 23}
IMAGE = {
    "hidden_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": 9,
    "patch_size": 3,
    "num_channels": 2,
    "layer_norm_eps": 1e-2,
}
T5 = {
    "vocab_size": 61,
    "d_model": 30,
    "d_kv": 7,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 5,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 11,
    "layer_norm_epsilon": 1e-2,
}
MASK_TOKEN = ("embeddings.mask_token",)
CASES = {
    "llama2": Case("LlamaForCausalLM", DECODER | {"rms_norm_eps": 1e-2, "head_dim": 4}, gradients=True),
    "llama3": Case(
        "LlamaForCausalLM",
        DECODER
        | {"rope_parameters": LLAMA3_ROPE, "head_dim": 10, "attention_bias": True, "mlp_bias": True}
        | {"hidden_act": "gelu", "tie_word_embeddings": True},
        shard_size="20KB",
        dtype=torch.bfloat16,
    ),
    "llama_linear": Case(
        "LlamaForCausalLM",
        DECODER | {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}},
    ),
    "llama_yarn": Case("LlamaForCausalLM", DECODER | {"rope_parameters": YARN_ROPE, "num_key_value_heads": 6}),
    "gpt2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_positions": 67, "n_embd": 28, "n_layer": 2, "n_head": 7, "n_inner": 37}
        | {"layer_norm_epsilon": 1e-2, "pad_token_id": 3},
        gradients=True,
    ),
    "gpt2_variant": Case(
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_positions": 67, "n_embd": 12, "n_layer": 2, "n_head": 3, "activation_function": "relu"}
        | {"scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM",
        {**{key: value for key, value in DECODER.items() if key != "num_key_value_heads"}, "layer_norm_eps": 1e-2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.67}},
    ),
    "gpt_neox_variant": Case(
        "GPTNeoXForCausalLM",
        {**{key: value for key, value in DECODER.items() if key != "num_key_value_heads"}, "hidden_act": "relu"}
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.34}},
    ),
    "mistral": Case("MistralForCausalLM", DECODER | {"sliding_window": 5, "head_dim": 8, "rms_norm_eps": 1e-2}),
    "mistral_variant": Case(
        "MistralForCausalLM",
        DECODER
        | {"sliding_window": None, "hidden_act": "gelu", "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "qwen2": Case(
        "Qwen2ForCausalLM",
        DECODER
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rms_norm_eps": 1e-2}
        | {"hidden_act": "gelu", "tie_word_embeddings": True, "rope_parameters": YARN_ROPE},
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM",
        DECODER
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "rms_norm_eps": 1e-2}
        | {"hidden_act": "gelu", "tie_word_embeddings": True, "head_dim": 10, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "gemma": Case(
        "GemmaForCausalLM",
        DECODER
        | {"head_dim": 10, "rms_norm_eps": 1e-2, "attention_bias": True, "tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        norm_mean=0.0,
        dtype=torch.bfloat16,
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        DECODER
        | {"head_dim": 10, "rms_norm_eps": 1e-2, "attention_bias": True, "query_pre_attn_scalar": 17}
        | {"sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
        | {"tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        norm_mean=0.0,
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        DECODER
        | {"head_dim": 10, "rms_norm_eps": 1e-2, "query_pre_attn_scalar": 17, "num_hidden_layers": 3}
        | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"final_logit_softcapping": 4.0, "attention_bias": True, "tie_word_embeddings": False}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
        norm_mean=0.0,
    ),
    "phi3": Case(
        "Phi3ForCausalLM",
        DECODER
        | {"sliding_window": 5, "rms_norm_eps": 1e-2, "hidden_act": "gelu", "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.67}},
    ),
    "olmo2": Case(
        "Olmo2ForCausalLM",
        DECODER
        | {"rms_norm_eps": 1e-2, "hidden_act": "gelu", "tie_word_embeddings": True, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "mixtral": Case(
        "MixtralForCausalLM",
        DECODER
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, "rms_norm_eps": 1e-2}
        | {"intermediate_size": 19, "head_dim": 8, "hidden_act": "gelu", "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        DECODER
        | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "norm_topk_prob": True}
        | {"head_dim": 8, "hidden_act": "gelu", "tie_word_embeddings": True, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rms_norm_eps": 1e-2}
        | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3_moe_variant": Case(
        "Qwen3MoeForCausalLM",
        DECODER | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 11, "head_dim": 8},
    ),
    "gpt_oss": Case(
        "GptOssForCausalLM",
        DECODER
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, "rms_norm_eps": 1e-2}
        | {"intermediate_size": 11, "head_dim": 8, "rope_parameters": YARN_ROPE | {"truncate": False}},
    ),
    "gpt_oss_variant": Case(
        "GptOssForCausalLM",
        DECODER
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": True, "attention_bias": False}
        | {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
        | {"intermediate_size": 11, "head_dim": 8},
    ),
    "bert": Case("BertModel", ENCODER | {"type_vocab_size": 3}, options={"add_pooling_layer": False}, gradients=True),
    "bert_masked": Case("BertForMaskedLM", ENCODER | {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "roberta": Case(
        "RobertaModel", ENCODER | {"hidden_act": "relu", "type_vocab_size": 1}, options={"add_pooling_layer": False}
    ),
    "roberta_masked": Case("RobertaForMaskedLM", ENCODER | {"type_vocab_size": 3, "pad_token_id": 2}),
    "xlm_roberta": Case(
        "XLMRobertaModel", ENCODER | {"hidden_act": "relu", "type_vocab_size": 1}, options={"add_pooling_layer": False}
    ),
    "xlm_roberta_masked": Case("XLMRobertaForMaskedLM", ENCODER | {"type_vocab_size": 3, "pad_token_id": 2}),
    "distilbert": Case("DistilBertModel", DISTILBERT),
    "distilbert_masked": Case("DistilBertForMaskedLM", DISTILBERT | {"activation": "relu", "pad_token_id": 3}),
    "vit": Case(
        "ViTModel",
        IMAGE | {"intermediate_size": 37, "hidden_act": "relu"},
        options={"add_pooling_layer": False},
    ),
    "vit_classes": Case(
        "ViTForImageClassification",
        IMAGE
        | {"image_size": [6, 9], "patch_size": [1, 3], "intermediate_size": 37, "qkv_bias": False, "num_labels": 7},
    ),
    "dinov2": Case(
        "Dinov2Model",
        IMAGE | {"mlp_ratio": 2, "hidden_act": "relu", "qkv_bias": False, "layerscale_value": 0.5},
        left_out=MASK_TOKEN,
    ),
    "dinov2_registers": Case(
        "Dinov2WithRegistersModel",
        IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True, "num_register_tokens": 3},
        left_out=MASK_TOKEN,
    ),
    "t5": Case("T5ForConditionalGeneration", T5 | {"num_decoder_layers": 1}, gradients=True),
    "t5_variant": Case(
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "n_positions": 31, "pad_token_id": 2},
        untied=True,
    ),
    "t5_encoder": Case("T5EncoderModel", T5 | {"feed_forward_proj": "gated-silu", "pad_token_id": 2}),
    "mt5": Case("MT5ForConditionalGeneration", T5 | {"n_positions": 31, "pad_token_id": 2}, untied=True),
    "mt5_variant": Case(
        "MT5ForConditionalGeneration", T5 | {"num_decoder_layers": 1, "feed_forward_proj": "gated-relu"}
    ),
    "mt5_encoder": Case("MT5EncoderModel", T5 | {"feed_forward_proj": "relu", "pad_token_id": 2}),
    "dinov2_registers_variant": Case(
        "Dinov2WithRegistersModel",
        IMAGE | {"hidden_act": "relu", "qkv_bias": False, "layerscale_value": 0.5, "mlp_ratio": 1},
        left_out=MASK_TOKEN,
    ),
}
