"""An encoder-decoder learns to write a sequence backwards: a skeleton of sequence-to-sequence training.

Shown: sequences of different lengths, masks, dropout, Optax, Flax's train state, a compiled step, logs and generation.
Takes 46 seconds of processor time on an Intel Xeon with AVX-512.
Run it with `python examples/seq2seq_skeleton.py`; `--help` lists the options. Needs attnax[train].
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from flax.training.train_state import TrainState

from attnax import Transformer, TransformerConfig, combine_masks, make_causal_mask, make_padding_mask
from attnax.nn import Probe
from attnax.visualize import plot_attention

PAD, START, END, FIRST_SYMBOL = 0, 1, 2, 3


class Batch(NamedTuple):
    """Sources (B, S), and targets (B, S + 2) that begin with START and end with END; PAD fills the rest."""

    source: np.ndarray
    target: np.ndarray


def make_batch(rng: np.random.Generator, batch_size: int, max_length: int, vocab_size: int) -> Batch:
    """Random sequences of 1 to max_length symbols, and the same sequences backwards. Put your own data here."""
    source = np.full((batch_size, max_length), PAD, np.int32)
    target = np.full((batch_size, max_length + 2), PAD, np.int32)
    for row, length in enumerate(rng.integers(1, max_length + 1, batch_size)):
        symbols = rng.integers(FIRST_SYMBOL, vocab_size, length)
        source[row, :length] = symbols
        target[row, : length + 2] = [START, *symbols[::-1], END]
    return Batch(source, target)


def draw_mask(mask: jax.Array) -> str:
    """The mask (1, T, S) of one row as text, a line for each query; # is a key that the query may attend."""
    return "\n".join("  " + "".join("#" if allowed else "." for allowed in line) for line in np.asarray(mask[0]))


def draw_attention(model: Transformer, source: np.ndarray, target: np.ndarray, path: Path) -> None:
    """Draws the attention of the last layer to `source` (S,), for each token of `target` (T,) that it reads."""
    look = jax.jit(lambda *ids: model.run(*ids, probe=Probe(attention_weights=True)).probed.cross_attention_weights[-1])
    labels = ["start" if token == START else str(token) for token in target]
    plot_attention(look(source[None], target[None]), path=path, query_labels=labels, key_labels=[*map(str, source)])


def words(ids: np.ndarray) -> str:
    """A sequence without its padding and end."""
    return " ".join(str(token) for token in ids if token >= FIRST_SYMBOL)


def main(
    steps: int = 600,
    batch_size: int = 64,
    max_length: int = 8,
    vocab_size: int = 16,
    d_model: int = 64,
    num_layers: int = 2,
    learning_rate: float = 2e-3,
    seed: int = 0,
    out: Path = Path("reverse.png"),
) -> float:
    """Trains, lets the model write new sequences backwards, draws its attention, and returns the share of right ones.

    Args:
        steps: training steps.
        batch_size: sequences in a step.
        max_length: longest sequence.
        vocab_size: number of symbols, with PAD, START and END.
        d_model: width of both halves.
        num_layers: depth of each half.
        learning_rate: of Adam, warmed up over a tenth of the steps and then decayed to 0 along a cosine.
        seed: of the data, the initial weights and the dropout.
        out: path of the picture.
    """
    config = TransformerConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=4,
        num_layers=num_layers,
        d_ff=2 * d_model,
        max_len=max_length + 2,
        dropout_rate=0.05,
        pad_token_id=PAD,
    )
    model = Transformer(nnx.Rngs(seed), encoder=config, decoder=config)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    print(f"{sum(array.size for array in jax.tree.leaves(params)):,} parameters")

    def apply(params, source, target, **options):
        return nnx.merge(graphdef, params, rest)(
            source,
            target,
            source_padding_mask=make_padding_mask(source, PAD),
            target_padding_mask=make_padding_mask(target, PAD),  # the decoder adds its causal mask
            **options,
        )

    @jax.jit
    def train_step(state, batch, key):
        inputs, labels = batch.target[:, :-1], batch.target[:, 1:]

        def loss_of(params):
            rngs = nnx.Rngs(dropout=jax.random.fold_in(key, state.step))
            logits = state.apply_fn(params, batch.source, inputs, deterministic=False, rngs=rngs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            real = labels != PAD
            return jnp.where(real, losses, 0).sum() / real.sum()

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = TrainState.create(apply_fn=apply, params=params, tx=optimizer)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)

    first = make_batch(rng, 1, max_length, vocab_size)
    inputs = first.target[:, :-1]
    print(f"source {first.source[0]}, target {first.target[0]}; the decoder's mask, padding and causal:")
    mask = combine_masks(make_padding_mask(inputs, PAD), make_causal_mask(inputs.shape[1]))
    print(draw_mask(mask[0]))

    for step in range(1, steps + 1):
        state, loss = train_step(state, make_batch(rng, batch_size, max_length, vocab_size), key)
        if step % max(1, steps // 10) == 0:
            print(f"step {step:4}  loss {loss:.3f}", flush=True)

    new = make_batch(rng, 256, max_length, vocab_size)
    model = nnx.merge(graphdef, state.params, rest)
    written = model.generate(
        new.source,
        max_length=max_length + 1,
        start_token=START,
        end_token=END,
        source_padding_mask=new.source != PAD,
    )
    before_end = np.arange(max_length + 1) < np.asarray(written.lengths)[:, None]
    tokens = np.where(before_end, written.tokens, PAD)
    right = (tokens == new.target[:, 1:]).all(axis=1)
    for row in range(5):
        print(f"{words(new.source[row]):>24}  ->  {words(tokens[row])}{'' if right[row] else '  (wrong)'}")
    longest = int((new.source != PAD).sum(axis=1).argmax())
    draw_attention(model, new.source[longest], new.target[longest, :-1], out)
    print(f"{right.sum()} of {len(right)} right")
    return float(right.mean())


if __name__ == "__main__":
    tyro.cli(main)
