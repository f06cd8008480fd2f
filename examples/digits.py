"""A vision transformer learns to read handwritten digits of 8 x 8 pixels: 1437 for training, 360 for the test.

Takes 1 minute 40 seconds of processor time on an Intel Xeon with AVX-512.
Run it with `python examples/digits.py`; `--help` lists the options. Needs attnax[examples].
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.scipy.ndimage import map_coordinates
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from attnax import VisionTransformer, VisionTransformerConfig


class Split(NamedTuple):
    """Images (number, 8, 8, 1) within 0 and 1, and their digits (number,)."""

    images: np.ndarray
    labels: np.ndarray


def load_splits(seed: int) -> tuple[Split, Split]:
    """Four fifths of the digits for training, and the rest for the test."""
    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.float32) / 16, digits.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = len(labels) * 4 // 5
    return Split(images[order[:cut]], labels[order[:cut]]), Split(images[order[cut:]], labels[order[cut:]])


def distort(image: jax.Array, key: jax.Array) -> jax.Array:
    """The image (8, 8, 1) shifted by up to 0.9 pixels, rotated by up to 0.2 radians and scaled by up to a tenth."""
    shift_key, turn_key, scale_key = jax.random.split(key, 3)
    shift = jax.random.uniform(shift_key, (2, 1, 1), minval=-0.9, maxval=0.9)
    turn = jax.random.uniform(turn_key, minval=-0.2, maxval=0.2)
    scale = jax.random.uniform(scale_key, minval=0.9, maxval=1.1)
    matrix = scale * jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]])
    center = (np.array(image.shape[:2], np.float32)[:, None, None] - 1) / 2
    pixels = np.indices(image.shape[:2], np.float32) - center
    places = jnp.einsum("ij,jhw->ihw", matrix, pixels) + center + shift
    return map_coordinates(image[..., 0], places, order=1)[..., None]


def draw_attention(vit: VisionTransformer, images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Draws each image above the attention of its class token in the last layer, averaged over the heads."""
    rows, columns = vit.patches.grid_size
    weights = np.asarray(jax.jit(vit.attention_weights)(images)[:, :, 0, -rows * columns :].mean(axis=1))
    guesses = np.asarray(jax.jit(vit)(images).argmax(-1))
    figure = Figure(figsize=(len(images), 2.3), layout="constrained")
    panels = figure.subplots(2, len(images), squeeze=False)
    for image, label, guess, weight, (above, below) in zip(images, labels, guesses, weights, panels.T, strict=True):
        above.set_title(f"{label} read as {guess}", fontsize="small")
        for panel in (above, below):
            panel.imshow(image[..., 0], cmap="gray_r", extent=(0, 8, 8, 0))
            panel.set_axis_off()
        share = weight.reshape(rows, columns) / weight.max()
        below.imshow(share, cmap="Reds", alpha=0.8 * share, extent=(0, 8, 8, 0), vmin=-1)
    figure.savefig(path, dpi=120)


def main(
    epochs: int = 80,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    d_model: int = 64,
    num_layers: int = 4,
    seed: int = 0,
    out: Path = Path("digits.png"),
) -> float:
    """Trains on the digits, draws the attention of the class token, and returns the test accuracy.

    Args:
        epochs: number of passes over the training images.
        batch_size: images in a step.
        learning_rate: the peak; it warms up over a tenth of the steps and then decays along a cosine.
        d_model: width of the model, a multiple of 4.
        num_layers: depth of the model.
        seed: of the split, the initial weights, the order of the images and their distortions.
        out: path of the picture.
    """
    train, test = load_splits(seed)
    config = VisionTransformerConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_classes=10,
        num_register_tokens=2,
        d_model=d_model,
        num_heads=4,
        num_layers=num_layers,
        d_ff=2 * d_model,
        pos_emb_type="sinusoidal",  # learned positions start far smaller than the patches, and need epochs to matter
    )
    # The model's structure is fixed; its parameters are an argument and a result of the compiled step.
    graphdef, params, rest = nnx.split(VisionTransformer(nnx.Rngs(seed), config), nnx.Param, ...)
    steps_per_epoch = len(train.labels) // batch_size
    steps = epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, images, labels, key):
        images = jax.vmap(distort)(images, jax.random.split(key, len(images)))

        def loss_of(params):
            logits = nnx.merge(graphdef, params, rest)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def accuracy(params, images, labels):
        return (nnx.merge(graphdef, params, rest)(images).argmax(-1) == labels).mean()

    opt_state = optimizer.init(params)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    for epoch in range(epochs):
        losses = []
        for batch in rng.permutation(len(train.labels))[: steps_per_epoch * batch_size].reshape(-1, batch_size):
            key, step_key = jax.random.split(key)
            params, opt_state, loss = train_step(params, opt_state, train.images[batch], train.labels[batch], step_key)
            losses.append(loss)
        progress = f"epoch {epoch + 1:3}  loss {np.mean(losses):.3f}  train accuracy {accuracy(params, *train):.4f}"
        print(progress, flush=True)
    result = float(accuracy(params, *test))
    print(f"test accuracy {result:.4f}")
    draw_attention(nnx.merge(graphdef, params, rest), test.images[:10], test.labels[:10], out)
    return result


if __name__ == "__main__":
    tyro.cli(main)
