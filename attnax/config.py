"""The configs of blocks and models: frozen dataclasses of JSON values. Wrong values raise clear errors."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from attnax.config_fields import ConfigFields, Forms, Overrides, as_pair, as_tuple, resolve_config, suggest

FfActivation = Literal[
    "gelu", "gelu_tanh", "relu", "relu2", "silu", "swish", "swiglu", "swiglu_clipped", "geglu", "geglu_tanh", "reglu"
]
"""The activation of a feed-forward; those with "glu" in their name multiply by a gate."""
NormKind = Literal["layer", "rms"]
"""LayerNorm or RMSNorm."""
NormPlacement = Literal["pre", "post", "sandwich", "branch"]
"""Where a block has its norms: before a sublayer, after its sum, both before and after it, or after it alone."""
PosEmbType = Literal["sinusoidal", "learned", "rope", "alibi", "relative", "none"]
"""How a model knows positions: embeddings, rotations of queries and keys, biases of scores, or not at all."""
RopeScalingKind = Literal["linear", "ntk", "yarn", "llama3"]
QkNorm = Literal["none", "head", "projection"]
AttentionGate = Literal["none", "head", "element"]
RouterType = Literal["softmax", "sigmoid"]
Initializer = Literal["lecun_normal", "xavier_uniform", "xavier_normal", "he_normal", "normal"]
ResidualInit = Literal["depth", "none"]
Remat = Literal["none", "full", "attention_out", "dots_saveable", "dots_with_no_batch_dims_saveable"]
Pool = Literal["cls", "mean"]
"""What a classifier of images reads: the class token, or the mean of the patches."""
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
"""A type of numbers, by its name."""

BIASES = ("query", "key", "value", "gate", "out", "feed_forward", "router", "norm", "head")

__all__ = [
    "AttentionType",
    "BlockConfig",
    "Dtype",
    "EncoderDecoderConfig",
    "FfActivation",
    "NormKind",
    "NormPlacement",
    "Pool",
    "PosEmbType",
    "RopeScaling",
    "StackConfig",
    "TransformerConfig",
    "VisionTransformerConfig",
    "resolve_config",
]


class AttentionType(enum.StrEnum):
    """The built-in attention functions that a config can name."""

    STANDARD = "standard"
    MEMORY_EFFICIENT = "memory_efficient"
    FLASH = "flash"
    PALLAS_FLASH = "pallas_flash"
    LINEAR = "linear"
    LITE = "lite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(ConfigFields):
    """Rotary positions beyond the length of a model's training.

    Attributes:
        kind: "linear" (positions / factor), "ntk" (a larger base), "yarn" (by wavelength, with a temperature) or
            "llama3" (by wavelength).
        factor: the new length divided by the length of training.
        original_max_len: the length of training, in tokens; needed by "yarn" and "llama3".
        beta_fast: "yarn": a frequency that turns at least this often within original_max_len stays as it is.
        beta_slow: "yarn": a frequency that turns at most this often is divided by factor.
        attention_factor: "yarn": the factor of cosines and sines, by default 0.1 log(factor) + 1.
        truncate: "yarn": the bounds between beta_fast and beta_slow are rounded outwards to whole frequencies.
        low_freq_factor: "llama3": a wavelength above original_max_len / low_freq_factor is stretched by factor.
        high_freq_factor: "llama3": a wavelength below original_max_len / high_freq_factor stays as it is.
    """

    kind: RopeScalingKind
    factor: float
    original_max_len: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        self._require_choices()
        self._require_above_zero(
            "factor", "beta_fast", "beta_slow", "attention_factor", "low_freq_factor", "high_freq_factor"
        )
        self._require_whole("original_max_len")
        self._require(self.factor >= 1.0, "factor must be at least 1")
        self._require(self.beta_fast > self.beta_slow, "beta_fast must be above beta_slow")
        self._require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor must be above low_freq_factor")
        if self.kind in ("yarn", "llama3"):
            self._require(self.original_max_len is not None, f"{self.kind} needs original_max_len")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(ConfigFields):
    """The options of one transformer block.

    Attributes:
        d_model: width of the residual stream.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; a divisor of num_heads, by default num_heads.
        head_dim: width of a query or key head, by default d_model / num_heads.
        value_head_dim: width of a value head, by default head_dim.
        qk_norm: RMSNorm of queries and keys before the rotation: "head" (over each head), "projection" (over all
            heads together) or "none".
        attention_type: the attention function; FLASH chooses the fastest for the machine.
        attention_block_size: tile length of MEMORY_EFFICIENT, FLASH and PALLAS_FLASH, by default by shape and mask.
        linear_attention_chunk_size: of LINEAR.
        attention_window: self-attention reaches the keys with |q - kv| < attention_window only.
        attention_scale: of the scores, by default head_dim ** -0.5.
        attention_soft_cap: scores become cap * tanh(scores / cap).
        attention_sinks: each head has a learned score that takes part in the softmax and has no value.
        attention_gate: the output of the heads is multiplied by the sigmoid of a projection of the layer's input, with
            one number for each "head" or each "element" of a head, before the output projection; or "none".
        attention_dropout_rate: probability of dropping an attention weight, by default dropout_rate.
        d_ff: hidden width of the feed-forward, or of each expert.
        ff_activation: "gelu" (exact), "gelu_tanh", "relu", "relu2" (squared), "silu" = "swish", or gated: "swiglu",
            "geglu", "geglu_tanh", "reglu", "swiglu_clipped" (that of gpt-oss).
        num_experts: number of experts of the feed-forward; None is one dense feed-forward.
        top_k: experts a token.
        num_shared_experts: further experts that every token goes through.
        router_type: "softmax" or "sigmoid" over the router's logits.
        router_renormalize: the weights of the chosen experts are divided by their sum.
        router_jitter: in training router inputs are multiplied by uniform numbers within 1 +- router_jitter.
        use_bias: True (all but router and head), False, or the names of the layers that have a bias, among query, key,
            value, gate (of attention), out, feed_forward, router, norm (LayerNorm only) and head (of a language model).
        dropout_rate: probability of dropping hidden activations of the feed-forward, outputs of sublayers and, in a
            model, embeddings.
        norm_type: "layer" or "rms".
        norm_eps: added to the variance.
        norm_offset: added to the scales of "rms" norms, which start at 1 - norm_offset.
        norm_placement: "pre" x + f(norm(x)), "post" norm(x + f(x)), "sandwich" x + norm(f(norm(x))), "branch"
            x + norm(f(x)).
        parallel_residual: x + attention(norm(x)) + feed_forward(norm'(x)), instead of one after the other.
        residual_scale: multiplies the output of each sublayer.
        layer_scale: initial value of a learned scale of every feature that a sublayer adds; None has no such scale.
        pos_emb_type: "rope" rotates queries and keys, "alibi" biases the scores by distance; the model applies
            "sinusoidal", "learned" and "relative".
        rope_base: the wavelength of the slowest rotation is about 2 pi * rope_base positions.
        rope_fraction: the part of each head that is rotated, from its start.
        rope_scaling: a RopeScaling, or a mapping of its fields.
        rope_max_positions: positions from here on raise an error if their values are known; None sets no limit.
        kernel_init: of every projection: "lecun_normal", "xavier_uniform", "xavier_normal", "he_normal", or "normal"
            with standard deviation init_std.
        embedding_init: of token embeddings, by the names of kernel_init; "lecun_normal" gives rows of unit length.
        init_std: of "normal".
        residual_init: "depth" divides the initial projections back into the stream by sqrt(2 * number of layers).
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    d_model: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    qk_norm: QkNorm = "none"
    attention_type: AttentionType = AttentionType.FLASH
    attention_block_size: int | None = None
    linear_attention_chunk_size: int = 64
    attention_window: int | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    attention_gate: AttentionGate = "none"
    attention_dropout_rate: float | None = None
    d_ff: int = 2048
    ff_activation: FfActivation = "gelu"
    num_experts: int | None = None
    top_k: int = 2
    num_shared_experts: int = 0
    router_type: RouterType = "softmax"
    router_renormalize: bool = True
    router_jitter: float = 0.0
    use_bias: bool | tuple[str, ...] = True
    dropout_rate: float = 0.1
    norm_type: NormKind = "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_placement: NormPlacement = "pre"
    parallel_residual: bool = False
    residual_scale: float = 1.0
    layer_scale: float | None = None
    pos_emb_type: PosEmbType = "none"
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    rope_max_positions: int | None = None
    kernel_init: Initializer = "lecun_normal"
    embedding_init: Initializer = "lecun_normal"
    init_std: float = 0.02
    residual_init: ResidualInit = "depth"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    _forms: ClassVar[Forms] = {
        "attention_type": lambda value: AttentionType(value) if value in list(AttentionType) else value,
        "use_bias": as_tuple,
        "rope_scaling": RopeScaling.from_mapping,
    }

    def __post_init__(self) -> None:
        biases = isinstance(self.use_bias, bool) or (isinstance(self.use_bias, tuple) and {*self.use_bias} <= {*BIASES})
        self._require(biases, f"use_bias must be True, False, or names among {', '.join(BIASES)}")
        types = ", ".join(AttentionType)
        self._require(isinstance(self.attention_type, AttentionType), f"attention_type must be one of {types}")
        scaling = self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)
        self._require(scaling, "rope_scaling must be a RopeScaling or a mapping of its fields")
        self._require_whole("d_model", "num_heads", "num_kv_heads", "head_dim", "value_head_dim", "d_ff", "top_k")
        self._require_whole("attention_block_size", "linear_attention_chunk_size", "attention_window")
        self._require_whole("rope_max_positions", "num_experts")
        self._require_whole("num_shared_experts", least=0)
        self._require_above_zero("norm_eps", "attention_scale", "attention_soft_cap", "residual_scale", "init_std")
        self._require_choices()
        self._require_rate("dropout_rate", "attention_dropout_rate", "router_jitter")
        self._require_above_zero("layer_scale", "rope_base", "rope_fraction")
        self._require(self.rope_base > 1.0, "rope_base must be above 1")
        self._require(self.rope_fraction <= 1.0, "rope_fraction must be above 0 and at most 1")
        self._require_consistent()

    def _require_consistent(self) -> None:
        """Raises ValueError for values that are right one by one, but not together."""
        self._require(self.num_heads % self.kv_heads == 0, "num_heads must be a multiple of num_kv_heads")
        self._require(
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            "d_model must be a multiple of num_heads unless head_dim is given",
        )
        self._require(self.num_experts is None or self.top_k <= self.num_experts, "top_k must be at most num_experts")
        if self.pos_emb_type == "rope":
            rule = "rope needs an even number of features, head_dim * rope_fraction; head_dim is d_model / num_heads"
            self._require(self.rope_dim % 2 == 0 and self.rope_dim > 0, f"{rule} by default")
        post = self.norm_placement == "post"
        self._require(not (self.parallel_residual and post), "parallel_residual needs another norm_placement than post")
        if self.attention_type in (AttentionType.LINEAR, AttentionType.LITE):
            for name in ("attention_scale", "attention_soft_cap", "attention_window"):
                self._require(getattr(self, name) is None, f"{self.attention_type} attention has no {name}")
            biased = self.pos_emb_type in ("alibi", "relative")
            self._require(not biased, f"{self.attention_type} attention has no scores to bias by pos_emb_type")
        if self.attention_type == AttentionType.LINEAR:
            rule = "linear attention has no weights to drop, so attention_dropout_rate must be 0 or None"
            self._require(not self.attention_dropout_rate, rule)

    @property
    def kv_heads(self) -> int:
        """num_kv_heads with its default applied."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """head_dim with its default applied."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_head_size(self) -> int:
        """value_head_dim with its default applied."""
        return self.head_size if self.value_head_dim is None else self.value_head_dim

    @property
    def rope_dim(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_size * self.rope_fraction)

    @property
    def attention_dropout(self) -> float:
        """attention_dropout_rate with its default applied; linear attention has no weights to drop."""
        if self.attention_type == AttentionType.LINEAR:
            return 0.0
        return self.dropout_rate if self.attention_dropout_rate is None else self.attention_dropout_rate

    @property
    def residual_init_scale(self) -> float:
        """Initial size of the output of a sublayer, relative to `kernel_init`."""
        return 1.0

    def has_bias(self, layer: str) -> bool:
        """Whether the layer of this name (see `use_bias`) has a bias."""
        if isinstance(self.use_bias, bool):
            return self.use_bias and layer not in ("router", "head")
        return layer in self.use_bias


def _pattern(value: Any) -> Any:
    """The entries of a layer_pattern, each an Overrides if it is a mapping; one entry may stand alone."""
    entries = value if isinstance(value, tuple | list) else [value]
    return tuple(
        Overrides({name: BlockConfig.in_form(name, field) for name, field in entry.items()})
        if isinstance(entry, Mapping)
        else entry
        for entry in entries
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig(BlockConfig):
    """Blocks on top of each other.

    Attributes:
        num_layers: number of blocks.
        layer_pattern: the fields that layers change, one mapping a layer, cycled: with
            `({"attention_window": 512}, {})` every other layer is local.
        scan_layers: parameters of all periods of the pattern are stacked, and the program loops over them: the compile
            time does not depend on the depth.
        remat: the part that the backward pass computes again rather than keeps: "none", "full" (all of a block),
            "attention_out" (all but the output of the attention heads) or the name of one of JAX's checkpoint policies.
    """

    num_layers: int = 6
    layer_pattern: tuple[Overrides, ...] = ()
    scan_layers: bool = False
    remat: Remat = "none"
    _forms: ClassVar[Forms] = {**BlockConfig._forms, "layer_pattern": _pattern}

    def __post_init__(self) -> None:
        self._require_whole("num_layers")
        mappings = isinstance(self.layer_pattern, tuple) and all(isinstance(x, Overrides) for x in self.layer_pattern)
        self._require(mappings, "layer_pattern must be a sequence of mappings")
        super().__post_init__()
        block_fields = {field.name for field in dataclasses.fields(BlockConfig)}
        for fields in self.layer_pattern:
            for name in fields:
                if name not in block_fields or name == "d_model":
                    raise ValueError(
                        f"{type(self).__name__}: layer_pattern may change the fields of BlockConfig, except d_model; "
                        f"got {name!r}.{suggest(name, block_fields)}"
                    )
        for layer in range(len(self.layer_pattern)):
            self.layer(layer)  # raises for values that do not fit together

    def layer(self, index: int) -> BlockConfig:
        """The config of one layer."""
        if not self.layer_pattern:
            return self
        overrides = self.layer_pattern[index % len(self.layer_pattern)]
        return dataclasses.replace(self, layer_pattern=(), **overrides)

    @property
    def residual_init_scale(self) -> float:
        """With residual_init="depth" 1 / sqrt(2 * num_layers), as in GPT-2: the variance does not grow with depth."""
        return 1.0 if self.residual_init == "none" else (2 * self.num_layers) ** -0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(StackConfig):
    """A stack of blocks over token embeddings.

    Attributes:
        vocab_size: number of token ids.
        max_len: longest sequence in tokens, except with "relative" positions, which have no limit; also the number of
            learned or sinusoidal positions.
        pos_emb_type: "sinusoidal" or "learned" vectors added to the embeddings, "rope" inside attention, "alibi" or
            "relative" (T5's learned buckets, one table for all layers) on its scores, or "none".
        relative_buckets: rows of the table of "relative".
        relative_max_distance: distances from here on share the last bucket.
        position_offset: rows of the table of "learned" before that of position 0.
        num_token_types: rows of a table of token types, whose vectors an encoder adds; 0 is no table.
        pad_token_id: for callers to pass to `make_padding_mask`; a model finds padding by its padding_mask alone.
        embedding_scale: multiplies the embeddings.
        embedding_norm: the sum of all embeddings is normalised.
        tie_embeddings: logits are products with the token embeddings instead of a projection of their own.
        logit_scale: multiplies the logits.
        logit_soft_cap: logits become cap * tanh(logits / cap), after the scale.
        kv_cache_max_len: capacity of the caches that `init_decoder_kv_caches_from_config` makes, by default max_len.
    """

    vocab_size: int
    max_len: int = 512
    pos_emb_type: PosEmbType = "sinusoidal"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    position_offset: int = 0
    num_token_types: int = 0
    pad_token_id: int = 0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    tie_embeddings: bool = False
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    kv_cache_max_len: int | None = None

    @property
    def cache_max_len(self) -> int:
        """kv_cache_max_len with its default applied."""
        return self.max_len if self.kv_cache_max_len is None else self.kv_cache_max_len

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole("vocab_size", "max_len", "kv_cache_max_len", "relative_buckets", "relative_max_distance")
        self._require_whole("pad_token_id", "position_offset", "num_token_types", least=0)
        self._require(self.pad_token_id < self.vocab_size, "pad_token_id must be below vocab_size")
        self._require_above_zero("embedding_scale", "logit_scale", "logit_soft_cap")
        if self.rope_max_positions is not None:
            self._require(self.rope_max_positions >= self.max_len, "rope_max_positions must be at least max_len")
        if self.pos_emb_type == "sinusoidal":
            self._require(self.d_model % 2 == 0, "sinusoidal positions need an even d_model")
        inside = {self.pos_emb_type, "rope", "alibi", "none"}
        fits = all(fields.get("pos_emb_type", "none") in inside for fields in self.layer_pattern)
        self._require(fits, "in layer_pattern a layer's own pos_emb_type must be rope, alibi or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(ConfigFields):
    """An encoder, and a decoder that attends the tokens of the encoder.

    Attributes:
        encoder: a TransformerConfig, or a mapping of its fields. Vocabulary, depth and widths may differ from the
            decoder's.
        decoder: likewise a TransformerConfig. Its `tie_embeddings` ties the head to the decoder's embeddings.
        share_embeddings: both have one table of token embeddings, the encoder's.
    """

    encoder: TransformerConfig
    decoder: TransformerConfig
    share_embeddings: bool = False
    _forms: ClassVar[Forms] = dict.fromkeys(("encoder", "decoder"), TransformerConfig.from_mapping)

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            half = getattr(self, name)
            if not isinstance(half, TransformerConfig):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a TransformerConfig; got {type(half).__name__}."
                )
        if not self.share_embeddings:
            return
        for name in ("vocab_size", "d_model", "dtype", "param_dtype"):
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ValueError(
                    f"{type(self).__name__}: with share_embeddings encoder and decoder must have one {name}; "
                    f"got {ours} and {theirs}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(StackConfig):
    """A stack of blocks over the patches of an image.

    Attributes:
        image_size: height and width in pixels, or the pair of them.
        patch_size: height and width of a patch in pixels, or the pair of them; a divisor of image_size.
        num_channels: of the image.
        num_classes: width of the head; None has no head and returns the tokens.
        use_cls_token: a learned token goes first.
        num_register_tokens: further learned tokens, after the class token, that no head reads.
        pool: the head reads the class token ("cls", which needs use_cls_token) or the mean of the patches ("mean").
        pos_emb_type: "learned" vectors added to class token and patches, "sinusoidal" ones of row and column added to
            the patches, or "none".
        position_antialias: `with_image_size` interpolates learned positions with antialiasing, so that a smaller grid
            averages positions rather than skips some. DINOv2 with registers has True; ViT and DINOv2 have False.
    """

    d_model: int = 768
    num_heads: int = 12
    num_layers: int = 12
    d_ff: int = 3072
    dropout_rate: float = 0.0
    pos_emb_type: PosEmbType = "learned"
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    num_classes: int | None = None
    use_cls_token: bool = True
    num_register_tokens: int = 0
    pool: Pool = "cls"
    position_antialias: bool = False
    _forms: ClassVar[Forms] = {**StackConfig._forms, "image_size": as_pair, "patch_size": as_pair}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "patch_size"):
            sides = getattr(self, name)
            whole = len(sides) == 2 and all(isinstance(side, int) and side >= 1 for side in sides)
            self._require(whole, f"{name} must be a whole number, at least 1, or a pair of them")
        self._require_whole("num_channels", "num_classes")
        self._require_whole("num_register_tokens", least=0)
        self._require(self.pool == "mean" or self.use_cls_token, "pool must be 'mean' without use_cls_token")
        divides = all(size % patch == 0 for size, patch in zip(self.image_size, self.patch_size, strict=True))
        self._require(divides, "image_size must be a multiple of patch_size")
        served = self.pos_emb_type in ("learned", "sinusoidal", "none")
        self._require(served, "pos_emb_type of an image must be learned, sinusoidal or none")
