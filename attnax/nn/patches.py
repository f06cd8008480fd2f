"""Images as sequences of patches, and the positions of patches."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.nn.embeddings import PositionalEncoding
from attnax.typing import Array, ArrayLike, Float

__all__ = ["GridPositionalEncoding", "PatchEmbedding"]


class PatchEmbedding(nnx.Module):
    """One linear map of each patch of an image; patches do not overlap and go row by row.

    A patch is read by row, column, channel, so the kernel (patch height * patch width * channels, d_model) is the
    kernel of a convolution, (patch height, patch width, channels, d_model), with its first axes merged.

    Args:
        rngs: for the initial weights.
        image_size: height and width in pixels, one number for both or a pair.
        patch_size: height and width of a patch, which divide image_size.
        num_channels: of the image.
        d_model: width of the result.
        kernel_init: initialiser `(key, shape, dtype)` of the kernel, by default "lecun_normal"; the bias starts at 0.
        dtype: of the computation, by default the promoted dtype of images and parameters.
        param_dtype: of the parameters.

    Raises:
        ValueError: a size below 1, or an image that patches do not fill.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax.nn.patches import PatchEmbedding
        >>> patches = PatchEmbedding(nnx.Rngs(0), image_size=(8, 12), patch_size=4, num_channels=3, d_model=5)
        >>> patches(jnp.zeros((1, 8, 12, 3))).shape
        (1, 6, 5)

    References:
        A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, https://arxiv.org/abs/2010.11929.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_channels: int,
        d_model: int,
        kernel_init: Any = None,
        dtype: Any = None,
        param_dtype: Any = "float32",
    ):
        self.image_size, self.patch_size = _sides("image_size", image_size), _sides("patch_size", patch_size)
        self.num_channels = num_channels
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(
                "PatchEmbedding: image_size must be a multiple of patch_size; "
                f"got image_size={image_size}, patch_size={patch_size}."
            )
        self.projection = nnx.Linear(
            self.patch_size[0] * self.patch_size[1] * num_channels,
            d_model,
            kernel_init=nnx.initializers.lecun_normal() if kernel_init is None else kernel_init,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_metadata={"axes": (None, None)},
            rngs=rngs,
        )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """The number of patches of an image."""
        return math.prod(self.grid_size)

    def __call__(self, images: Float[ArrayLike, "B height width channels"]) -> Float[Array, "B P D"]:
        """The patches of `images`, (batch, rows * columns, d_model).

        Raises:
            ValueError: images of another shape, or not floating.
        """
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[1:] != (*self.image_size, self.num_channels):
            raise ValueError(
                "PatchEmbedding: images must be (batch, height, width, channels) with "
                f"image_size={self.image_size}, num_channels={self.num_channels}; got images.shape={images.shape}. "
                "Resize the images, or the model by `with_image_size`."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"PatchEmbedding: images must be floating; got images.dtype={images.dtype}. "
                "Scale them first, as in images.astype('float32') / 255."
            )
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        batch, cut = images.shape[0], jax.typeof(images).sharding  # Explicit axes may shard the batch
        by_batch = jax.NamedSharding(cut.mesh, jax.P(cut.spec[0])) if any(cut.spec) else None
        reshape = partial(jnp.reshape, out_sharding=by_batch)
        pixels = reshape(images, (batch, rows, height, columns, width, self.num_channels)).swapaxes(2, 3)
        vectors = reshape(pixels, (batch * self.num_patches, self.projection.in_features))
        vectors = self.projection(vectors)  # one matrix product, as in Linear
        return reshape(vectors, (batch, self.num_patches, self.projection.out_features))


class GridPositionalEncoding(nnx.Module):
    """Adds sinusoids to the features of a patch: of its row to the first half, of its column to the second half.

    Args:
        grid: rows and columns of patches.
        d_model: width, a multiple of 4.

    References:
        L. Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022, https://arxiv.org/abs/2205.01580.
    """

    def __init__(self, grid: tuple[int, int], d_model: int):
        if d_model % 4:
            raise ValueError(
                f"GridPositionalEncoding: d_model must be a multiple of 4, sine and cosine of row and column; "
                f"got d_model={d_model}."
            )
        self.rows, self.columns = (PositionalEncoding(count, d_model // 2) for count in grid)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """The patches, in order row by row, with their positions added."""
        halves = zip(
            (self.rows, self.columns),
            jnp.split(x, 2, axis=-1),
            np.divmod(np.arange(x.shape[1])[None, :], self.columns.max_len),
            strict=True,
        )
        return jnp.concatenate([encode(half, position_ids=place) for encode, half, place in halves], axis=-1)


def _sides(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ValueError(
            f"PatchEmbedding: {name} must be a whole number, at least 1, or a pair of them; got {name}={size!r}."
        )
    return pair
