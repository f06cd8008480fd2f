"""What a block and a model are made of, as frozen dataclasses of JSON values, validated in words."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, TypeVar, get_args

FfActivation = Literal["gelu", "relu", "silu", "swiglu", "geglu"]
NormKind = Literal["layer", "rms"]
NormPlacement = Literal["pre", "post", "sandwich"]
PosEmbType = Literal["sinusoidal", "learned", "rope", "none"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]

__all__ = [
    "BlockConfig",
    "Dtype",
    "FfActivation",
    "NormKind",
    "NormPlacement",
    "PosEmbType",
    "TransformerConfig",
    "create_config",
    "resolve_config",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Everything that one transformer block needs.

    Attributes:
        d_model: width of the residual stream.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; a divisor of num_heads, by default num_heads.
        head_dim: width of a head, by default d_model / num_heads.
        d_ff: hidden width of the feed-forward.
        ff_activation: "gelu" (exact), "relu", "silu", or gated: "swiglu", "geglu".
        use_bias: biases in the projections, the feed-forward and LayerNorm.
        dropout_rate: probability of dropping attention weights, hidden activations of the feed-forward, outputs of
            sublayers and, in a model, embeddings.
        norm_type: "layer" or "rms".
        norm_eps: added to the variance.
        norm_placement: "pre" x + f(norm(x)), "post" norm(x + f(x)), "sandwich" x + norm(f(norm(x))).
        pos_emb_type: "rope" rotates queries and keys; a block does nothing with the others.
        rope_base: the wavelength of the slowest rotation is about 2 pi * rope_base positions.
        rope_max_positions: positions from here on are an error where they can be seen; None sets no limit.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    d_model: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 2048
    ff_activation: FfActivation = "gelu"
    use_bias: bool = True
    dropout_rate: float = 0.1
    norm_type: NormKind = "layer"
    norm_eps: float = 1e-6
    norm_placement: NormPlacement = "pre"
    pos_emb_type: PosEmbType = "none"
    rope_base: float = 10000.0
    rope_max_positions: int | None = None
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        self._require_positive("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "rope_max_positions")
        self._require_choice(ff_activation=FfActivation, norm_type=NormKind, norm_placement=NormPlacement)
        self._require_choice(pos_emb_type=PosEmbType, dtype=Dtype, param_dtype=Dtype)
        self._require(0.0 <= self.dropout_rate < 1.0, "dropout_rate must be at least 0 and below 1", "dropout_rate")
        self._require(self.norm_eps > 0.0, "norm_eps must be above 0", "norm_eps")
        self._require(self.rope_base > 1.0, "rope_base must be above 1", "rope_base")
        self._require(
            self.num_heads % self.kv_heads == 0,
            "num_heads must be a multiple of num_kv_heads",
            "num_heads",
            "num_kv_heads",
        )
        self._require(
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            "d_model must be a multiple of num_heads unless head_dim is given",
            "d_model",
            "num_heads",
        )
        if self.pos_emb_type == "rope":
            self._require(self.head_size % 2 == 0, "rope needs an even head_dim", "d_model", "num_heads", "head_dim")

    @property
    def kv_heads(self) -> int:
        """num_kv_heads with its default applied."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """head_dim with its default applied."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def residual_scale(self) -> float:
        """Initial size of what a sublayer adds to the stream, relative to a unit-variance projection."""
        return 1.0

    def _require(self, holds: bool, rule: str, *names: str) -> None:
        if not holds:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise ValueError(f"{type(self).__name__}: {rule}; got {values}.")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            self._require(value is None or whole, f"{name} must be a whole number, at least 1", name)

    def _require_choice(self, **choices: Any) -> None:
        for name, literal in choices.items():
            options = get_args(literal)
            self._require(getattr(self, name) in options, f"{name} must be one of {', '.join(options)}", name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """A stack of blocks over token embeddings.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of blocks.
        max_len: longest sequence in tokens; also the number of learned or sinusoidal positions.
        pos_emb_type: "sinusoidal" or "learned" vectors added to the embeddings, "rope" inside attention, or "none".
        tie_embeddings: logits are products with the token embeddings instead of a projection of their own.
        kv_cache_max_len: capacity of the caches that `init_decoder_kv_caches_from_config` makes, by default max_len.
    """

    vocab_size: int
    num_layers: int = 6
    max_len: int = 512
    pos_emb_type: PosEmbType = "sinusoidal"
    tie_embeddings: bool = False
    kv_cache_max_len: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("vocab_size", "num_layers", "max_len", "kv_cache_max_len")
        if self.rope_max_positions is not None:
            self._require(
                self.rope_max_positions >= self.max_len,
                "rope_max_positions must be at least max_len",
                "rope_max_positions",
                "max_len",
            )
        if self.pos_emb_type == "sinusoidal":
            self._require(self.d_model % 2 == 0, "sinusoidal positions need an even d_model", "d_model")

    @property
    def residual_scale(self) -> float:
        """1 / sqrt(2 * num_layers), as in GPT-2: the stream's variance does not grow with depth."""
        return (2 * self.num_layers) ** -0.5


Config = TypeVar("Config", bound=BlockConfig)


def create_config(kind: type[Config], **fields: Any) -> Config:
    """The config of these fields; the documented `use_pre_norm` and `use_rope` are translated.

    Raises:
        ValueError: a field that does not exist or is missing, or a value that it cannot have.
    """
    for flag, name, meaning in (
        ("use_pre_norm", "norm_placement", {True: "pre", False: "post"}),
        ("use_rope", "pos_emb_type", {True: "rope", False: "none"}),
    ):
        if flag in fields:
            if name in fields:
                raise ValueError(f"{kind.__name__}: {flag} is another way to say {name}; give one of the two.")
            fields[name] = meaning[bool(fields.pop(flag))]
    required = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    for name in fields.keys() - required.keys():
        close = difflib.get_close_matches(name, required, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"The fields are {', '.join(sorted(required))}."
        raise ValueError(f"{kind.__name__}: every argument must be a field; got {name}={fields[name]!r}. {hint}")
    missing = sorted(name for name, needed in required.items() if needed and name not in fields)
    if missing:
        raise ValueError(f"{kind.__name__}: {', '.join(missing)} must be given.")
    return kind(**fields)


def resolve_config(kind: type[Config], config: BlockConfig | None, fields: dict[str, Any]) -> Config:
    """The config of a module called as `Module(rngs, config)` or as `Module(rngs, **fields)`.

    Raises:
        ValueError: both or neither were given, a field does not exist, or `config` is of another kind.
    """
    if config is None:
        return create_config(kind, **fields)
    if fields:
        raise ValueError(
            f"{kind.__name__}: give a config or fields, not both; got config and {', '.join(sorted(fields))}. "
            "Use dataclasses.replace(config, ...)."
        )
    if not isinstance(config, kind):
        raise ValueError(f"{kind.__name__}: config must be a {kind.__name__}; got {type(config).__name__}.")
    return config
