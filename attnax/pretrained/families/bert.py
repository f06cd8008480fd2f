"""BERT: the encoder, and the masked language model with its head."""

import dataclasses
from typing import Any

from attnax.config import TransformerConfig
from attnax.models.masked import MaskedLM
from attnax.models.transformer import TransformerEncoder
from attnax.pretrained.family import Family
from attnax.pretrained.fields import PLAIN, choice, only, pad_token, real, whole, without
from attnax.pretrained.rules import Rule, attention, embedding, linear, norm, within

__all__ = ["BERT", "BERT_MASKED", "EMBEDDINGS", "FIELDS", "HARMLESS", "RULES", "encoder_of"]

BIASES = ("feed_forward", "key", "norm", "out", "query", "value")
CONSTANTS: dict[str, Any] = {
    "norm_type": "layer",
    "norm_placement": "post",
    "pos_emb_type": "learned",
    "embedding_norm": True,
    "dropout_rate": 0.0,
    "use_bias": BIASES,
}
FIELDS = (
    whole("vocab_size", "vocab_size"),
    whole("hidden_size", "d_model"),
    whole("num_hidden_layers", "num_layers"),
    whole("num_attention_heads", "num_heads"),
    whole("intermediate_size", "d_ff"),
    whole("type_vocab_size", "num_token_types", 2),
    real("layer_norm_eps", "norm_eps", 1e-12),
    only("position_embedding_type", "absolute"),
)
HARMLESS = ("hidden_dropout_prob", "attention_probs_dropout_prob")

EMBEDDINGS = (
    *embedding("{base}embeddings.word_embeddings", "encoder.embed.tokens"),
    *embedding("{base}embeddings.position_embeddings", "encoder.embed.positions"),
    *norm("{base}embeddings.LayerNorm", "encoder.embed.norm"),
)
RULES = (
    *EMBEDDINGS,
    *embedding("{base}embeddings.token_type_embeddings", "encoder.embed.types"),
    *within(
        "{base}encoder.layer.{layer}",
        "encoder.stack.blocks.{layer}",
        attention("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        norm("attention.output.LayerNorm", "around_attention.norm_sum"),
        linear("intermediate.dense", "feed_forward.up"),
        linear("output.dense", "feed_forward.down"),
        norm("output.LayerNorm", "around_feed_forward.norm_sum"),
    ),
)

BERT_MASKED = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    aliases=("BertForPreTraining",),
    model=MaskedLM,
    config=TransformerConfig,
    constants=CONSTANTS | {"tie_embeddings": True, "use_bias": (*BIASES, "head")},
    fields=(
        *FIELDS,
        choice("hidden_act", "ff_activation", PLAIN, "gelu"),
        whole("max_position_embeddings", "max_len", 512),
        pad_token(),
        only("tie_word_embeddings", True),
    ),
    harmless=(
        *HARMLESS,
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
        *("pooler_size_per_head", "pooler_type"),
    ),
    bases=("bert.", ""),
    rules=(
        *RULES,
        *linear("cls.predictions.transform.dense", "transform"),
        *norm("cls.predictions.transform.LayerNorm", "norm"),
        Rule("cls.predictions.bias", ("head.bias",)),
    ),
    # The tensors that only predict the next sentence are not read.
    buffers=(
        *("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias", "cls.predictions.decoder.bias"),
        *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
    ),
    tied=("cls.predictions.decoder.weight",),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)


def encoder_of(masked: Family, architecture: str) -> Family:
    """The family of the encoder alone: its tensors have no prefix, and a file may also hold any head."""
    rules = tuple(
        dataclasses.replace(rule, parameters=tuple(name.removeprefix("encoder.") for name in rule.parameters))
        for rule in masked.rules
        if rule.tensor.startswith("{base}")
    )
    return dataclasses.replace(
        masked,
        architecture=architecture,
        aliases=(),
        model=TransformerEncoder,
        constants={**masked.constants, "use_bias": BIASES, "tie_embeddings": False},
        fields=without(masked.fields, "tie_word_embeddings"),
        harmless=(*masked.harmless, "tie_word_embeddings"),
        bases=tuple(reversed(masked.bases)),
        rules=rules,
        body=masked.bases[:1],
    )


BERT = encoder_of(BERT_MASKED, "BertModel")
