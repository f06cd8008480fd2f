"""A masked language model of Python: it learns the hidden bytes of source code, and fills in words.

The text is the standard library; the model is a `MaskedLM`, trained by `Trainer` and `masked_lm`.

Takes 5 minutes 54 seconds of processor time on an Intel Xeon of 2.0 GHz with AVX-512.
Run it with `python examples/masked_source.py`; `--help` lists the options. Needs attnax[train].
"""

import re
from pathlib import Path

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from attnax import TransformerConfig
from attnax.models import MaskedLM
from attnax.text import byte_tokenizer
from attnax.training import Batches, OptimizerConfig, TokenStream, Trainer, masked_lm, read_corpus

QUESTION = b"for index, item in enumer?te(items):\n    result.app?nd(item)\n    ret?rn result\n"


def draw_guesses(guesses: list[list[str]], probabilities: np.ndarray, words: list[str], path: Path) -> None:
    """Draws the likeliest bytes of each hidden place, and their `probabilities` (places, guesses)."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(probabilities.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (column, row), probability in np.ndenumerate(probabilities):
        color = "white" if probability > 0.5 else "black"
        axes.text(column, row, guesses[column][row], ha="center", va="center", color=color, parse_math=False)
    axes.set_xticks(range(len(words)), words, parse_math=False)
    axes.set(yticks=[], ylabel="likeliest first")
    figure.colorbar(image, label="probability")
    figure.savefig(path, dpi=100)


def main(
    steps: int = 2000,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    d_model: int = 64,
    num_layers: int = 2,
    length: int = 128,
    files: int | None = None,
    seed: int = 0,
    out: Path = Path("masked.png"),
) -> float:
    """Trains, fills the marks of a text, draws the guesses, and returns the bits for a hidden byte of held-out files.

    Args:
        steps: updates of the parameters.
        batch_size: pieces of text in an update.
        learning_rate: the peak.
        d_model: width of the model, a multiple of 4.
        num_layers: depth of the model.
        length: bytes of a piece.
        files: the number of files to learn from; by default all.
        seed: of the parameters, the order of the pieces, what is hidden, and dropout.
        out: path of the picture.
    """
    corpus, tokenizer = read_corpus(), byte_tokenizer()
    mask = tokenizer.vocab_size  # one more token
    texts = ([document.text for document in part][:files] for part in (corpus.train, corpus.held_out))
    train, test = (TokenStream(tokenizer.encode_documents(part), length - 1) for part in texts)
    print(f"{len(train)} pieces to learn from, {len(test)} held out", flush=True)

    config = TransformerConfig(
        vocab_size=mask + 1,
        d_model=d_model,
        num_heads=4,
        num_layers=num_layers,
        d_ff=4 * d_model,
        pos_emb_type="rope",
        dropout_rate=0.0,
    )
    trainer = Trainer(
        lambda rngs: MaskedLM(rngs, config),
        masked_lm(mask_token=mask, special_tokens=[tokenizer.special.document]),
        OptimizerConfig(algorithm="muon", steps=steps, learning_rate=learning_rate),
        seed=seed,
    )
    state, losses = trainer.init(), []
    with Batches(train, batch_size=batch_size, seed=seed).start() as batches:
        for step in range(1, steps + 1):
            state, metrics = trainer.step(state, next(batches))
            losses.append(metrics.loss)
            if step % 100 == 0 or step == steps:
                print(f"step {step:4}  {np.mean(losses[-100:]) / np.log(2):.2f} bits for a hidden byte", flush=True)

    ids = np.array([mask if byte == ord("?") else tokenizer.encode(bytes([byte]))[0] for byte in QUESTION], np.int32)
    logits = trainer.merge(state.params)(ids[None], deterministic=True)[0, :, :mask]
    hidden, text = np.flatnonzero(ids == mask), np.where(ids == mask, logits.argmax(-1), ids)
    probabilities, likeliest = jax.lax.top_k(jax.nn.softmax(logits[hidden]), 5)
    guesses = [[repr(tokenizer.decode([token]))[1:] for token in place] for place in likeliest.tolist()]
    draw_guesses(guesses, np.asarray(probabilities), re.findall(r"\w*\?\w*", QUESTION.decode()), out)
    print(tokenizer.decode(text).decode("utf-8", "replace"), end="")
    held_out = Batches(test, batch_size=min(len(test), 256))[0]
    bits = trainer.evaluate(state.params, [{"tokens": held_out["tokens"][0]}]).loss / np.log(2)
    print(f"held out: {bits:.2f} bits for a hidden byte")
    return float(bits)


if __name__ == "__main__":
    tyro.cli(main)
