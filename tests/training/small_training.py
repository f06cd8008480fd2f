"""A small training in plain Optax: AdamW, dropout, batches and random numbers that are functions of the update.

As a script it trains in a folder, saves at every update, and can be told where to die; `test_killed.py` runs it.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnax import TransformerConfig, TransformerLM
from attnax.nn.axes import parameter_shardings
from attnax.training import Checkpoints, checkpoints, durable, manifest
from attnax.training.orbax_files import OrbaxSave

CONFIG = TransformerConfig(
    vocab_size=16, d_model=8, num_heads=4, num_layers=1, d_ff=12, max_len=8, dropout_rate=0.1, pos_emb_type="rope"
)
OPTIMIZER = optax.adamw(1e-2)


class SmallTraining:
    """The state is a dict of pytrees, on the devices of a layout or on one device."""

    def __init__(self, layout=None, devices=None):
        self.mesh = None if layout is None else layout.mesh(devices)
        abstract = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), CONFIG))
        self._graphdef, params, self._rest = nnx.split(abstract, nnx.Param, ...)
        state = jax.eval_shape(self._init)
        if self.mesh is None:
            self.likes, self._shardings = state, None
        else:
            whole = jax.NamedSharding(self.mesh, jax.P())
            cut = nnx.to_pure_dict(parameter_shardings(params, self.mesh))
            moments = optax.tree_utils.tree_map_params(
                OPTIMIZER, lambda _, place: place, state["opt_state"], cut, transform_non_params=lambda _: whole
            )
            self._shardings = {"params": cut, "opt_state": moments, "counters": {"update": whole}}
            self.likes = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, self._shardings
            )
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=self._shardings and (self._shardings, None))

    def _init(self):
        model = TransformerLM(nnx.Rngs(0), CONFIG)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return {"params": params, "opt_state": OPTIMIZER.init(params), "counters": {"update": jnp.zeros((), jnp.int32)}}

    def init(self):
        """The state before the first update."""
        return jax.jit(self._init, out_shardings=self._shardings)()

    def _update(self, state, tokens):
        update = state["counters"]["update"]

        def loss(params):
            model = TransformerLM(nnx.Rngs(0, dropout=jax.random.fold_in(jax.random.key(1), update)), CONFIG)
            nnx.update(model, nnx.State(params))
            logits = model(tokens[:, :-1], deterministic=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(state["params"])
        changes, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], changes)
        return {"params": params, "opt_state": opt_state, "counters": {"update": update + 1}}, value

    def step(self, state):
        """Makes an update; the state is donated."""
        tokens = np.random.default_rng(int(state["counters"]["update"])).integers(0, 16, (8, 9), np.int32)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self._step(state, tokens)


def _die(after=0.0):
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)


PHASES = ("commit", "hash", "manifest", "collection")


def _die_at(phase, count, part):
    """Lets the process die in a phase of its save number `count`; `part` of 1 says when in this phase."""

    def at(place, name, calls, die_after=False):
        original, made = getattr(place, name), []

        def call(*arguments, **options):
            made.append(name)
            if len(made) == calls and not die_after:
                _die(0.02 * part if phase == "commit" else 0.0)
            result = original(*arguments, **options)
            if len(made) == calls:
                _die()
            return result

        setattr(place, name, call)

    if phase == "commit":  # while the threads of Orbax write
        at(OrbaxSave, "wait", count)
    elif phase == "hash":
        at(manifest, "_hash_and_sync", 40 * (count - 1) + int(40 * part))
    elif phase == "manifest" and part < 0.3:
        at(manifest, "write_durable", count)
    elif phase == "manifest":
        at(durable.os, "replace", count, die_after=part < 0.6)
    elif phase == "collection" and part < 0.3:
        at(checkpoints, "delete", count)
    elif phase == "collection":
        at(os, "unlink", 1 + int(100 * part))  # of about 20 files of each checkpoint


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--die", choices=PHASES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    training = SmallTraining()
    with Checkpoints(options.folder, keep_best=1) as saving:
        done, state = saving.restore(training.likes) or (0, training.init())
        random = np.random.default_rng(options.seed)
        _die_at(options.die, int(random.integers(1, 4)), random.uniform())
        print("restored", done, flush=True)
        for update in range(done + 1, options.updates + 1):
            state, loss = training.step(state)
            saving.save(update, state, metric=float(loss))
            print("durable", update - 1, flush=True)  # a save waits for the last one
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    print("final", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main()
