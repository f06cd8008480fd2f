"""A classifier of text: which package of the standard library does a function come from?

The functions are written as rows of JSON, {"text", "label"}, from which a store of tokens is made. The model is a
`SentenceEncoder` with a head, trained by `Trainer` and `classification`.

Takes 49 seconds of processor time on an Intel Xeon with AVX-512.
Run it with `python examples/label_source.py`; `--help` lists the options. Needs attnax[train].
"""

import ast
import json
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure

from attnax import TransformerConfig
from attnax.models import SentenceEncoder, TransformerEncoder
from attnax.text import train_bpe
from attnax.training import (
    Batches,
    OptimizerConfig,
    TextRows,
    Trainer,
    classification,
    make_store,
    read_corpus,
)

PACKAGES = "asyncio", "email", "idlelib", "multiprocessing", "tkinter", "unittest"


def functions_of(package: str) -> list[str]:
    """The source of each function in a package."""
    found = []
    for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
        text = path.read_text("utf-8")
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        found += [ast.get_source_segment(text, node) for node in nodes]
    return found


class Classifier(nnx.Module):
    """Logits of the classes of each text."""

    def __init__(self, rngs: nnx.Rngs, config: TransformerConfig, num_classes: int):
        self.encoder = SentenceEncoder(TransformerEncoder(rngs, config), normalize=False)
        self.head = nnx.Linear(config.d_model, num_classes, rngs=rngs)

    def __call__(self, tokens: jax.Array, padding_mask: jax.Array) -> jax.Array:
        return self.head(self.encoder(tokens, padding_mask=padding_mask))


def draw_confusion(labels: np.ndarray, guesses: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draws how many functions of each class (rows) are taken for each class (columns)."""
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (labels, guesses), 1)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(counts / counts.sum(1, keepdims=True), cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, str(count), ha="center", va="center", color="white" if row == column else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="read as", ylabel="package")
    figure.savefig(path, dpi=100)


def main(
    steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    d_model: int = 64,
    length: int = 64,
    per_package: int | None = None,
    seed: int = 0,
    out: Path = Path("labels.png"),
) -> float:
    """Trains on nine functions of ten, draws the mistakes in the others, and returns the share that is right.

    Args:
        steps: updates of the parameters.
        batch_size: functions in an update.
        learning_rate: the peak.
        d_model: width of the model, a multiple of 4.
        length: tokens of a function that the model reads.
        per_package: the greatest number of functions of a package; by default all.
        seed: of the parameters, the order of the functions and dropout.
        out: path of the picture.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"text": text, "label": name} for name in PACKAGES for text in functions_of(name)[:per_package]]
        source = Path(folder, "functions.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        corpus = read_corpus(str(source), held_out=0.1)
        store = make_store(corpus, train_bpe(corpus.train.sample(), 1024), Path(folder, "store"))
        train, test = (TextRows(store, length=length, part=part, truncate=True) for part in ("train", "held_out"))
        print(f"{len(train)} functions to learn from, {len(test)} held out", flush=True)

        config = TransformerConfig(
            vocab_size=store.tokenizer.vocab_size,
            d_model=d_model,
            num_heads=4,
            num_layers=2,
            d_ff=2 * d_model,
            pos_emb_type="rope",
        )
        trainer = Trainer(
            lambda rngs: Classifier(rngs, config, len(store.classes)),
            classification(padding_token=train.padding),
            OptimizerConfig(steps=steps, learning_rate=learning_rate),
            seed=seed,
        )
        state, losses = trainer.init(), []
        with Batches(train, batch_size=batch_size, seed=seed).start() as batches:
            for step in range(1, steps + 1):
                state, metrics = trainer.step(state, next(batches))
                losses.append(metrics.loss)
                if step % 50 == 0 or step == steps:
                    print(f"step {step:4}  loss {np.mean(losses[-50:]):.3f}", flush=True)
        held_out = [test[index] for index in range(len(test))]
        batch = {name: np.stack([row[name] for row in held_out]) for name in held_out[0]}
        accuracy = trainer.evaluate(state.params, [batch]).aux["accuracy"]
        logits = jax.jit(trainer.merge(state.params))(batch["tokens"], batch["tokens"] != train.padding)
        draw_confusion(batch["labels"], np.asarray(logits.argmax(-1)), store.classes, out)
        largest = np.bincount(batch["labels"]).max() / len(test)
        print(f"held-out accuracy {accuracy:.3f}; the most frequent package alone: {largest:.3f}")
    return accuracy


if __name__ == "__main__":
    tyro.cli(main)
