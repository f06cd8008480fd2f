"""Keys of a config.json that change nothing in the results of a model.

`HARMLESS` keys may be in any config.json. The other keys belong to no family here: programs add these keys, or they are
keys of other families. No class in transformers reads them for the families here. `ANY_VALUE` lists keys that change
nothing with any value, `HARMLESS_VALUES` keys that change nothing with the listed values.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ANY_VALUE", "HARMLESS", "HARMLESS_VALUES", "is_inert"]

HARMLESS = frozenset(
    {
        # the origin of the file
        *("_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
        # of texts rather than of the model: tokens, tasks
        *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class", "prefix"),
        *("task_specific_params", "problem_type", "finetuning_task", "id2label", "label2id", "num_labels"),
        # how transformers generates a text: generation_config.py reads these
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "min_length", "num_beams", "repetition_penalty"),
        *("max_new_tokens", "early_stopping", "length_penalty", "no_repeat_ngram_size", "num_return_sequences"),
        *("encoder_no_repeat_ngram_size", "num_beam_groups", "diversity_penalty", "typical_p", "penalty_alpha"),
        *("epsilon_cutoff", "eta_cutoff", "min_p", "min_new_tokens", "bad_words_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "cache_implementation", "guidance_scale"),
        *("sequence_bias", "encoder_repetition_penalty", "stop_strings", "max_time"),
        # how transformers computes, and the form of its results
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16"),
        *("_attn_implementation", "_attn_implementation_autoset", "chunk_size_feed_forward", "gradient_checkpointing"),
        # initial weights and training; loaded models have no dropout
        *("initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "classifier_dropout"),
    }
)
"""Keys of any config.json that change nothing in the results of a trained model."""

ANY_VALUE = frozenset(
    {
        # the origin of the file, and classes for programs that run foreign code
        *("auto_map", "transformers.js_config", "unsloth_fixed", "unsloth_version", "model_name", "base_model_name"),
        *("finetuned_from", "trust_remote_code", "attn_implementation", "experts_implementation", "keys_to_ignore"),
        # of the first versions of transformers and their classes in TensorFlow
        *("tie_weights_", "n_special", "predict_special_tokens", "output_past", "tf_legacy_loss", "xla_device"),
        *("is_composition", "output_scores", "return_dict_in_generate"),
        # of texts: their length, and the meaning of tokens
        *("max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "model_max_length", "language"),
        *("unk_token_id", "cls_token_id", "mask_token_id", "pad_token", "bos_token", "eos_token", "vocab_file"),
        # how the same numbers are computed
        *("use_flash_attn", "use_flash_attention", "use_flash_attention_2", "flash_attention", "use_xformers"),
        *("pretraining_tp", "tensor_parallel", "pad_vocab_size_multiple", "unpad_inputs", "fused_mlp"),
        # of training; loaded models have no dropout
        *("neftune_noise_alpha", "dropout", "dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        *("attention_dropout_prob", "activation_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "layerdrop"),
        *("embedding_dropout", "classifier_dropout_prob", "pooler_dropout", "label_smoothing", "aux_loss_alpha"),
        *("initializer_cutoff_factor", "custom_pipelines"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "loss_type"),
        # of heads that are not read
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "pooler_hidden_act", "pooler_hidden_size"),
    }
)
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    # switches of other families, turned off
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
    """Whether a key that the family does not have changes nothing: it is null, private to a program, or in a table."""
    if value is None or key.startswith("_") or key in ANY_VALUE:
        return True
    return any(type(value) is type(harmless) and value == harmless for harmless in HARMLESS_VALUES.get(key, ()))
