"""A training loop of one's own on the devices of a layout gives the losses of one device; Orbax saves the parameters.

The step is the same function for one device and for many. The layout says where the parameters lie, the model reads the
layout from the mesh around the call, and `jax.jit` does everything else. Without accelerators the script makes eight
devices of the CPU. `attnax.training.Trainer` and `attnax train` take a layout too.
Takes 32 seconds of processor time on an Intel Xeon with AVX-512.

    python examples/many_devices.py
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.figure import Figure

from attnax import Layout, TransformerConfig, TransformerLM
from attnax.nn import parameter_shardings
from attnax.sharding import BATCH

CONFIG = TransformerConfig(
    vocab_size=31, d_model=32, num_heads=4, num_layers=2, d_ff=64, max_len=16, pos_emb_type="rope", dropout_rate=0.0
)
OPTIMIZER = optax.adamw(1e-2)


def train(steps, mesh):
    """The losses of some steps, and the model; each row of a batch counts up from a random number."""
    graphdef, params, rest = nnx.split(TransformerLM(nnx.Rngs(0), CONFIG), nnx.Param, ...)
    params = jax.tree.map(jax.device_put, params, parameter_shardings(params, mesh))
    state = params, OPTIMIZER.init(params)  # moments lie like their parameters

    @jax.jit
    def step(state, tokens):
        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    losses, rng = [], np.random.default_rng(0)
    for _ in range(steps):
        tokens = (rng.integers(0, 31, (16, 1)) + np.arange(17)) % 31
        with jax.set_mesh(mesh):
            state, loss = step(state, jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(BATCH))))
        losses.append(float(loss))
    return losses, nnx.merge(graphdef, state[0], rest)


def save_and_restore(model, folder):
    """A new model with the parameters of `model`, saved to a file and restored."""
    other = TransformerLM(nnx.Rngs(1), CONFIG)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute() / "params", nnx.state(model, nnx.Param))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(Path(folder).absolute() / "params", nnx.state(other, nnx.Param)))
    return other


def draw_losses(one, many, layout, path):
    """Draws the losses of one device and, on them, those of a layout."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(one, linewidth=5, alpha=0.4, label="one device")
    axes.plot(many, color="black", linewidth=1, label=layout)
    axes.set(xlabel="step", ylabel="loss in nats")
    axes.legend()
    figure.savefig(path, dpi=100)


def main(steps=20, layout="fsdp=4,tensor=2", out="many-devices.png"):
    """Draws and returns the losses of one device and of the devices of the layout."""
    one, _ = train(steps, Layout().mesh(jax.devices()[:1]))
    mesh = Layout.parse(layout).mesh()
    many, model = train(steps, mesh)
    for step in range(0, steps, max(1, steps // 5)):
        print(f"step {step:3}  one device {one[step]:.6f}  {layout} {many[step]:.6f}")
    draw_losses(one, many, layout, out)
    with tempfile.TemporaryDirectory() as folder:
        restored = save_and_restore(model, folder)
    ids = jnp.arange(5)[None, :]
    # One device and all devices add up in another order, and logits of 6 have steps of 5e-7.
    np.testing.assert_allclose(restored(ids), model(ids), rtol=1e-5, atol=1e-5)
    print(
        f"greatest difference {max(abs(a - b) for a, b in zip(one, many, strict=True)):.1e}; restored: the same logits"
    )
    return one, many


if __name__ == "__main__":
    main()
