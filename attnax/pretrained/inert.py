"""Keys that files carry beside those of their family, and with which values they change nothing.

No class in transformers reads them for the families that are read here.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ANY_VALUE", "HARMLESS_VALUES", "is_inert"]

ANY_VALUE = frozenset(
    {
        # who wrote the file, for whom, and the class for those who run code of others
        *("auto_map", "transformers.js_config", "unsloth_fixed", "unsloth_version", "model_name", "base_model_name"),
        *("finetuned_from", "trust_remote_code", "attn_implementation", "experts_implementation", "keys_to_ignore"),
        # the files of the first versions of transformers, and what their classes in TensorFlow did
        *("tie_weights_", "n_special", "predict_special_tokens", "output_past", "tf_legacy_loss", "xla_device"),
        *("is_composition", "output_scores", "return_dict_in_generate"),
        # texts: how long they may be, and which tokens stand for what
        *("max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "model_max_length", "language"),
        *("unk_token_id", "cls_token_id", "mask_token_id", "pad_token", "bos_token", "eos_token", "vocab_file"),
        # how it is computed, the same numbers
        *("use_flash_attn", "use_flash_attention", "use_flash_attention_2", "flash_attention", "use_xformers"),
        *("pretraining_tp", "tensor_parallel", "pad_vocab_size_multiple", "unpad_inputs", "fused_mlp"),
        # training; models come without dropout
        *("neftune_noise_alpha", "dropout", "dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        *("attention_dropout_prob", "activation_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "layerdrop"),
        *("embedding_dropout", "classifier_dropout_prob", "pooler_dropout", "label_smoothing", "aux_loss_alpha"),
        *("initializer_cutoff_factor", "custom_pipelines"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "loss_type"),
        # heads that are not read
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "pooler_hidden_act", "pooler_hidden_size"),
    }
)
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    # what some other family does, and this file does not
    **dict.fromkeys(
        (
            *("rope_interleaved", "tie_encoder_decoder", "use_sliding_window", "use_mrope", "alibi", "use_alibi"),
            *("qk_norm", "use_qk_norm", "qk_layernorm", "mlp_bias", "attention_bias", "use_parallel_residual"),
            *("use_dynamic_ntk", "use_logn_attn", "is_quantized", "use_bidirectional_attention", "use_moe"),
            *("embd_layer_norm", "lm_head_bias"),
        ),
        (False,),
    ),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1, 1.0)),
    **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
    "partial_rotary_factor": (1, 1.0),
    "is_llama_config": (True,),
    "adapters": ({},),
}


def is_inert(key: str, value: Any) -> bool:
    """Whether a key that the family does not have changes nothing: null, of some program's own, or one of the table."""
    if value is None or key.startswith("_") or key in ANY_VALUE:
        return True
    return any(type(value) is type(harmless) and value == harmless for harmless in HARMLESS_VALUES.get(key, ()))
