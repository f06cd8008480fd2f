"""T5, its versions 1.1 and Flan, and mT5: the encoder-decoder, and its encoder alone."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from attnax.config import EncoderDecoderConfig, TransformerConfig
from attnax.models.seq2seq import Transformer
from attnax.models.transformer import TransformerEncoder
from attnax.pretrained.errors import quoted
from attnax.pretrained.family import Family
from attnax.pretrained.fields import Field, choice, only, pad_token, real, unread, whole
from attnax.pretrained.rules import Rule, attention, embedding, linear, norm, within

__all__ = ["MT5", "MT5_ENCODER", "T5", "T5_ENCODER"]

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",  # the tanh form, in spite of the name
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
}
CONSTANTS: dict[str, Any] = {
    "norm_type": "rms",
    "pos_emb_type": "relative",
    "attention_scale": 1.0,
    "use_bias": False,
    "dropout_rate": 0.0,
}


def _feed_forward(default: str) -> Field:
    """`feed_forward_proj`, and the keys that transformers derives from it and writes too."""
    name = choice("feed_forward_proj", "ff_activation", ACTIVATIONS, default)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        fields = name.read(given)
        gate, _, function = given.get("feed_forward_proj", default).rpartition("-")
        function = "gelu_new" if (gate, function) == ("gated", "gelu") else function
        for key, implied in (("dense_act_fn", function), ("is_gated_act", gate == "gated")):
            if given.get(key, implied) != implied:
                raise ValueError(
                    f"{key} must be {implied!r}, as feed_forward_proj has it; got {key}={quoted(given[key])}."
                )
        return fields

    return Field((*name.keys, "dense_act_fn", "is_gated_act"), read, name.write)


def _fields(vocab_size: int, d_ff: int, num_layers: int, num_heads: int, feed_forward: str) -> tuple[Field, ...]:
    """The fields of an encoder, with these defaults."""
    return (
        whole("vocab_size", "vocab_size", vocab_size),
        whole("d_model", "d_model", 512),
        dataclasses.replace(whole("d_kv", "head_dim", 64), write=lambda config: {"d_kv": config.head_size}),
        whole("d_ff", "d_ff", d_ff),
        whole("num_layers", "num_layers", num_layers),
        whole("num_heads", "num_heads", num_heads),
        whole("relative_attention_num_buckets", "relative_buckets", 32),
        whole("relative_attention_max_distance", "relative_max_distance", 128),
        real("layer_norm_epsilon", "norm_eps", 1e-6),
        whole("n_positions", "max_len", 512),  # no limit, since positions are relative
        _feed_forward(feed_forward),
        pad_token(),
    )


FIELDS = _fields(32128, 2048, 6, 8, "relu")
MT5_FIELDS = _fields(250112, 1024, 8, 6, "gated-gelu")
_EMBEDDINGS = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
HARMLESS = ("dropout_rate", "output_past")


def _num_decoder_layers() -> Field:
    depth = whole("num_decoder_layers", "num_decoder_layers", None)
    return Field(depth.keys, depth.read, lambda config: {"num_decoder_layers": config.decoder.num_layers})


def _head(*, scales: bool) -> Field:
    """Whether the head is tied, and with `scales` whether its logits are divided by the square root of the width."""
    keys = ("tie_word_embeddings", "scale_decoder_outputs") if scales else ("tie_word_embeddings",)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        tied = given.get("tie_word_embeddings", True)
        fields = {"tied": tied, "scaled": scales and given.get("scale_decoder_outputs", tied)}
        for key, value in zip(keys, fields.values(), strict=False):
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false; got {key}={quoted(value)}.")
        if scales and "tie_word_embeddings" in given and tied and "scale_decoder_outputs" not in given:
            raise ValueError(
                "tie_word_embeddings=True is of mT5 if scale_decoder_outputs is missing. Set model_type to 'mt5', "
                "with an architecture of mT5, or scale_decoder_outputs: true for T5, false for version 1.1 and later."
            )
        return fields

    def write(config: EncoderDecoderConfig) -> dict[str, Any]:
        scaled = {1.0: False} | ({config.decoder.d_model**-0.5: True} if scales else {})
        if config.decoder.logit_scale not in scaled:
            known = "1 or d_model ** -0.5" if scales else "1"
            raise ValueError(f"logit_scale must be {known}; got logit_scale={config.decoder.logit_scale}.")
        return dict(zip(keys, (config.decoder.tie_embeddings, scaled[config.decoder.logit_scale]), strict=False))

    return Field(keys, read, write)


def _of_encoder(field: Field) -> Field:
    """A field that both halves share, written from the encoder's."""
    return dataclasses.replace(field, write=lambda config: field.write(config.encoder))


def _pair(*, num_decoder_layers: int | None, tied: bool, scaled: bool, **fields: Any) -> EncoderDecoderConfig:
    encoder = TransformerConfig(**fields)
    decoder = dataclasses.replace(
        encoder,
        num_layers=encoder.num_layers if num_decoder_layers is None else num_decoder_layers,
        tie_embeddings=tied,
        logit_scale=encoder.d_model**-0.5 if scaled else 1.0,
    )
    return EncoderDecoderConfig(encoder=encoder, decoder=decoder, share_embeddings=True)


def _untie(config: EncoderDecoderConfig, given: Mapping[str, Any], names: Collection[str]) -> EncoderDecoderConfig:
    """The config without a tied head, for files that hold a head.

    config.json cannot tell: transformers 5 always writes tie_word_embeddings=true.
    """
    is_new = "scale_decoder_outputs" in given or given.get("model_type") == "mt5"
    if not is_new or "lm_head.weight" not in names or _EMBEDDINGS.isdisjoint(names):
        return config
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_embeddings=False))


def _feed_forward_rules(sublayer: int) -> tuple[Rule, ...]:
    dense = f"layer.{sublayer}.DenseReluDense"
    return (
        *norm(f"layer.{sublayer}.layer_norm", "around_feed_forward.norm_in"),
        *linear(f"{dense}.wi", "feed_forward.up", gated=False),
        *linear(f"{dense}.wi_0", "feed_forward.gate"),
        *linear(f"{dense}.wi_1", "feed_forward.up", gated=True),
        *linear(f"{dense}.wo", "feed_forward.down"),
    )


SELF_ATTENTION = (
    *norm("layer.0.layer_norm", "around_attention.norm_in"),
    *attention(*(f"layer.0.SelfAttention.{name}" for name in "qkvo")),
)
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
ENCODER = (
    *embedding("shared", "encoder.embed.tokens"),
    *within("encoder.block.{layer}", "encoder.stack.blocks.{layer}", SELF_ATTENTION, _feed_forward_rules(1)),
    Rule(f"encoder.{BIAS}", ("encoder.relative_bias.table",)),
    *norm("encoder.final_layer_norm", "encoder.norm"),
)
DECODER = (
    *within(
        "decoder.block.{layer}",
        "decoder.stack.blocks.{layer}",
        SELF_ATTENTION,
        norm("layer.1.layer_norm", "around_cross_attention.norm_in"),
        attention(*(f"layer.1.EncDecAttention.{name}" for name in "qkvo"), parameter="cross_attention"),
        _feed_forward_rules(2),
    ),
    Rule(f"decoder.{BIAS}", ("decoder.relative_bias.table",)),
    *norm("decoder.final_layer_norm", "decoder.norm"),
    Rule("lm_head.weight", ("head.projection.kernel",), "O I -> I O"),
)

T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    aliases=("T5Model", "T5WithLMHeadModel"),
    model=Transformer,
    config=_pair,
    constants=CONSTANTS,
    fields=(*map(_of_encoder, FIELDS), _num_decoder_layers(), _head(scales=True), only("is_encoder_decoder", True)),
    harmless=HARMLESS,
    rules=(*ENCODER, *DECODER),
    # An unused tensor in files of the first version.
    buffers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    tied=("lm_head.weight",),
    repeated=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    adapt=_untie,
)
T5_ENCODER = Family(
    model_type="t5",
    architecture="T5EncoderModel",
    model=TransformerEncoder,
    config=TransformerConfig,
    constants=CONSTANTS,
    fields=(*FIELDS, unread("is_encoder_decoder")),
    harmless=(*HARMLESS, "num_decoder_layers", "tie_word_embeddings", "scale_decoder_outputs"),
    rules=tuple(
        dataclasses.replace(rule, parameters=tuple(name.removeprefix("encoder.") for name in rule.parameters))
        for rule in ENCODER
    ),
    body=("encoder.", "shared."),
    tied=(),
    repeated=("encoder.embed_tokens.weight",),
)
MT5 = dataclasses.replace(
    T5,
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    aliases=("MT5Model",),
    fields=(
        *map(_of_encoder, MT5_FIELDS),
        _num_decoder_layers(),
        _head(scales=False),
        only("is_encoder_decoder", True),
    ),
)
MT5_ENCODER = dataclasses.replace(
    T5_ENCODER,
    model_type="mt5",
    architecture="MT5EncoderModel",
    fields=(*MT5_FIELDS, unread("is_encoder_decoder")),
)
