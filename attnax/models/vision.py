"""The vision transformer."""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.checks import check_options, wide_dtype
from attnax.config import VisionTransformerConfig, resolve_config
from attnax.masks import Mask
from attnax.nn._parts import MakeBlock, block_maker
from attnax.nn._run import Mode, SelfAttentionOptions, select_options
from attnax.nn.blocks import EncoderBlock, Output
from attnax.nn.dropout import Dropout
from attnax.nn.embeddings import LearnedPositionalEmbedding
from attnax.nn.linear import Linear, make_initializer
from attnax.nn.norms import norm_of
from attnax.nn.patches import GridPositionalEncoding, PatchEmbedding
from attnax.nn.probe import Probe
from attnax.nn.stack import Stack
from attnax.typing import Array, ArrayLike, AttentionFn, Float, MaskMod, ScoreMod

__all__ = ["VisionTransformer", "with_image_size"]


class VisionOptions(SelfAttentionOptions, total=False):
    """The options of `VisionTransformer`, which `__call__` describes."""

    mask: Mask | MaskMod | ArrayLike | None


class VisionTransformer(nnx.Module):
    """A stack of encoder blocks over the patches of an image; returns logits, or tokens if num_classes is None.

    Called as `VisionTransformer(rngs, config)` or with the fields of VisionTransformerConfig as keywords. The tokens
    are the class token (with use_cls_token), then the registers, then the patches row by row. Learned positions are
    added to the class token and the patches; sinusoidal positions, of row and column, to the patches only.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a VisionTransformerConfig. The head always has a bias.
        make_block: `(rngs, config) -> block`, called once for each layer with its config, in place of the library's
            EncoderBlock. `attnax.nn.Stack` says what a block is, and docs/guides/own-blocks.md has examples.
        attention_fn: of self-attention in every layer, as in `MultiHeadAttention`; a function without arrays.
        **fields: fields of VisionTransformerConfig; an unknown field or a value out of range raises ValueError.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax.models.vision import VisionTransformer
        >>> size = {"image_size": 8, "patch_size": 2, "d_model": 12, "num_heads": 3, "num_layers": 1, "d_ff": 20}
        >>> VisionTransformer(nnx.Rngs(0), **size, num_classes=10)(jnp.zeros((1, 8, 8, 3))).shape
        (1, 10)
        >>> VisionTransformer(nnx.Rngs(0), **size)(jnp.zeros((1, 8, 8, 3))).shape
        (1, 17, 12)

    References:
        A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, https://arxiv.org/abs/2010.11929.
        T. Darcet et al., "Vision Transformers Need Registers", 2023, https://arxiv.org/abs/2309.16588.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: VisionTransformerConfig | None = None,
        *,
        make_block: MakeBlock | None = None,
        attention_fn: AttentionFn | None = None,
        **fields: Any,
    ):
        self.config = config = resolve_config(VisionTransformerConfig, config, fields)
        self.patches = PatchEmbedding(
            rngs,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            d_model=config.d_model,
            kernel_init=make_initializer(config.kernel_init, config.init_std),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )
        self.class_token = nnx.data(_learned_tokens(rngs, config, int(config.use_cls_token)))
        self.registers = nnx.data(_learned_tokens(rngs, config, config.num_register_tokens))
        self.positions: Any = nnx.data(None)
        if config.pos_emb_type == "sinusoidal":
            self.positions = nnx.data(GridPositionalEncoding(self.patches.grid_size, config.d_model))
        elif config.pos_emb_type == "learned":
            self.positions = nnx.data(
                LearnedPositionalEmbedding(
                    rngs,
                    num_positions=int(config.use_cls_token) + self.patches.num_patches,
                    d_model=config.d_model,
                    param_dtype=config.param_dtype,
                )
            )
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)
        self.stack = Stack(rngs, config, block_maker("VisionTransformer", EncoderBlock, make_block, attention_fn))
        # After "post" blocks the stream is normalised already.
        self.norm = nnx.data(None if config.norm_placement == "post" else norm_of(config, rngs))
        with_bias = dataclasses.replace(config, use_bias=("head",))
        self.head = nnx.data(
            None
            if config.num_classes is None
            else Linear(
                rngs, with_bias, config.d_model, config.num_classes, bias="head", axes=("embed", "vocab"), logits=True
            )
        )

    def __call__(
        self,
        images: Float[ArrayLike, "B height width channels"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        score_mod: ScoreMod | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B C"] | Float[Array, "B T D"]:
        """Logits of `images`, or their tokens.

        Args:
            images: (batch, height, width, channels), floating.
            mask: True to attend, by default all, of every layer; indices count tokens. A Mask, a function
                `(b, h, q, kv) -> bool`, or a boolean array that broadcasts to (batch, num_heads, T, T).
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            score_mod: applied to the attention scores of every layer; indices count tokens.
            rngs: randomness of the dropout, instead of the stored streams.

        Returns:
            Float32 logits (batch, num_classes), or with num_classes=None the tokens (batch, T, d_model): class token,
            registers, patches.

        Raises:
            ValueError: images of another shape, or not floating.
        """
        out = self.run(images, mask=mask, deterministic=deterministic, score_mod=score_mod, rngs=rngs)
        return out.hidden if self.head is None else out.logits

    def run(
        self,
        images: Float[ArrayLike, "B height width channels"],
        *,
        probe: Probe | None = None,
        **options: Unpack[VisionOptions],
    ) -> Output:
        """The call; it always returns an Output, with tokens in `hidden` and what a `probe` asks for in `probed`."""
        check_options("VisionTransformer", options, VisionOptions)
        x = self._embed(images, **select_options(options, Mode))
        out = self.stack.run(x, probe=probe, **options)
        tokens = out.hidden if self.norm is None else self.norm(out.hidden)
        out = out._replace(hidden=tokens)
        if self.head is None:
            return out
        pooled = tokens[:, 0] if self.config.pool == "cls" else tokens[:, -self.patches.num_patches :].mean(axis=1)
        return out._replace(logits=self.head(pooled))

    def attention_weights(
        self,
        images: Float[ArrayLike, "B height width channels"],
        layer: int = -1,
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
    ) -> Float[Array, "B N T S"]:
        """The attention weights of one layer, (batch, num_heads, T, T); no dropout.

        All layers are computed: `run(images, probe=Probe(attention_weights=True))` returns the weights of all.

        Args:
            images: as in a call.
            layer: index of the layer; -1 is the last layer.
            mask: as in a call.
            score_mod: as in a call.

        Raises:
            ValueError: a layer that the model does not have, or as in a call.
        """
        count = self.config.num_layers
        if not -count <= layer < count:
            raise ValueError(f"VisionTransformer: layer must be the index of one of {count} layers; got layer={layer}.")
        probe = Probe(attention_weights=True)
        seen = self.run(images, probe=probe, mask=mask, score_mod=score_mod, deterministic=True).probed
        assert seen is not None
        weights: Array = seen.attention_weights[layer]
        return weights

    def _embed(self, images: ArrayLike, **mode: Unpack[Mode]) -> Float[Array, "B T D"]:
        """The tokens that enter the first block."""
        x = self.patches(images)
        if self.config.pos_emb_type == "sinusoidal":
            x = self.positions(x)
        if self.class_token is not None:
            x = jnp.concatenate([_repeat(self.class_token, x), x], axis=1)
        if self.config.pos_emb_type == "learned":
            x = self.positions(x)
        if self.registers is not None:
            first = int(self.config.use_cls_token)
            x = jnp.concatenate([x[:, :first], _repeat(self.registers, x), x[:, first:]], axis=1)
        return self.dropout(x, **mode)


def with_image_size(model: VisionTransformer, image_size: int | tuple[int, int]) -> VisionTransformer:
    """A copy of `model` for images of another size; learned positions of patches are interpolated bicubically.

    The interpolation is the one of transformers, with antialiasing if the config has `position_antialias`. The position
    of the class token and all other parameters stay unchanged.

    Args:
        model: a VisionTransformer.
        image_size: as in VisionTransformerConfig.

    Raises:
        ValueError: an image that patches do not fill.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax.models.vision import VisionTransformer, with_image_size
        >>> size = {"image_size": 8, "patch_size": 2, "d_model": 12, "num_heads": 3, "num_layers": 1, "d_ff": 20}
        >>> vit = VisionTransformer(nnx.Rngs(0), **size, num_classes=10)
        >>> with_image_size(vit, (12, 10))(jnp.zeros((1, 12, 10, 3))).shape
        (1, 10)

    References:
        R. Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981,
        https://doi.org/10.1109/TASSP.1981.1163711.
    """
    image_size = dataclasses.replace(model.config, image_size=cast("Any", image_size)).image_size
    grid_size, model = model.patches.grid_size, nnx.clone(model)
    modules: list[Any] = [module for _, module in nnx.iter_modules(model)]
    for module in modules:
        if isinstance(getattr(module, "config", None), VisionTransformerConfig):
            module.config = dataclasses.replace(module.config, image_size=image_size)
    model.patches.image_size = image_size
    if isinstance(model.positions, GridPositionalEncoding):
        model.positions = GridPositionalEncoding(model.patches.grid_size, model.config.d_model)
    elif model.positions is not None:
        table = model.positions.embedding
        first, patches = jnp.split(table[...], [int(model.config.use_cls_token)])
        patches = _resize(patches.reshape(*grid_size, -1), model.patches.grid_size, model.config.position_antialias)
        model.positions.embedding = table.replace(jnp.concatenate([first, patches.reshape(-1, patches.shape[2])]))
    return model


def _resize(table: Array, grid_size: tuple[int, int], antialias: bool) -> Array:
    """The table (rows, columns, D) interpolated to another grid, in at least float32."""
    rows, columns = (_bicubic(*counts, antialias) for counts in zip(table.shape[:2], grid_size, strict=True))
    exact = table.astype(wide_dtype(table.dtype))
    resized = jnp.einsum("Rr,rcD,Cc->RCD", rows, exact, columns, precision="highest")
    return resized.astype(table.dtype)


def _bicubic(old: int, new: int, antialias: bool) -> np.ndarray:
    """(new, old) weights of the old places in each new place, as in torch.nn.functional.interpolate.

    Both grids reach from edge to edge. Without antialiasing the cubic covers 4 places at any step, and places
    outside of the grid repeat the edge. With antialiasing a step above 1 stretches the cubic, and places outside get no
    weight.
    """
    step = old / new
    width, a = (max(step, 1.0), -0.5) if antialias else (1.0, -0.75)
    places = np.arange(old) if antialias else np.arange(-2, old + 2)
    x = np.abs((np.arange(new)[:, None] + 0.5) * step - 0.5 - places) / width
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        return weights / weights.sum(axis=1, keepdims=True)
    return weights @ (places.clip(0, old - 1)[:, None] == np.arange(old))


def _learned_tokens(rngs: nnx.Rngs, config: VisionTransformerConfig, count: int) -> nnx.Param[Array] | None:
    if count == 0:
        return None
    init = make_initializer("normal", 0.02)  # not 0: registers without positions would stay equal to each other
    return nnx.Param(init(rngs.params(), (count, config.d_model), config.param_dtype), axes=(None, None))


def _repeat(tokens: nnx.Param[Array], x: Array) -> Array:
    """The tokens for each row of x."""
    repeated = jnp.broadcast_to(tokens[...].astype(x.dtype), (x.shape[0], *tokens.shape))
    cut = jax.typeof(x).sharding  # Explicit axes of a mesh may shard the batch
    return jax.sharding.reshard(repeated, cut) if any(cut.spec) else repeated
