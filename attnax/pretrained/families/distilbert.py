"""DistilBERT: BERT without token types."""

import dataclasses

from attnax.pretrained.families.bert import BERT_MASKED, EMBEDDINGS, encoder_of
from attnax.pretrained.fields import PLAIN, choice, only, pad_token, whole
from attnax.pretrained.rules import Rule, attention, linear, norm, within

__all__ = ["DISTILBERT", "DISTILBERT_MASKED"]

DISTILBERT_MASKED = dataclasses.replace(
    BERT_MASKED,
    model_type="distilbert",
    architecture="DistilBertForMaskedLM",
    aliases=(),
    constants={**BERT_MASKED.constants, "norm_eps": 1e-12},
    fields=(
        whole("vocab_size", "vocab_size"),
        whole("dim", "d_model"),
        whole("n_layers", "num_layers"),
        whole("n_heads", "num_heads"),
        whole("hidden_dim", "d_ff"),
        whole("max_position_embeddings", "max_len", 512),
        choice("activation", "ff_activation", PLAIN, "gelu"),
        pad_token(),
        only("tie_word_embeddings", True),
    ),
    harmless=("dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"),
    bases=("distilbert.", ""),
    rules=(
        *EMBEDDINGS,
        *within(
            "{base}transformer.layer.{layer}",
            "encoder.stack.blocks.{layer}",
            attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
            norm("sa_layer_norm", "around_attention.norm_sum"),
            linear("ffn.lin1", "feed_forward.up"),
            linear("ffn.lin2", "feed_forward.down"),
            norm("output_layer_norm", "around_feed_forward.norm_sum"),
        ),
        *linear("vocab_transform", "transform"),
        *norm("vocab_layer_norm", "norm"),
        Rule("vocab_projector.bias", ("head.bias",)),
    ),
    buffers=("embeddings.position_ids",),
    tied=("vocab_projector.weight",),
)
DISTILBERT = encoder_of(DISTILBERT_MASKED, "DistilBertModel")
