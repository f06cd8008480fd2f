"""`attnax train`: from text to a language model, a curve, a sample and a figure."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from attnax.cli.generate import load_model, write_text
from attnax.cli.options import RunOptions, Train
from attnax.cli.run_folder import RunFolder
from attnax.generation import Sampler
from attnax.training import (
    Corpus,
    Document,
    Tokenizer,
    TokenStream,
    Trainer,
    TrainState,
    byte_tokenizer,
    latest_checkpoint,
    read_corpus,
    restore_checkpoint,
    save_checkpoint,
    train_bpe,
)
from attnax.typing import InputError
from attnax.visualize import plot_training


def train(options: Train) -> int:
    """Runs the command; returns 0, or 128 + the number of the signal that interrupted it."""
    if options.resume is None:
        run, settings, corpus, tokenizer = _start(options)
    else:
        run, settings, corpus, tokenizer = _reopen(options)
    session = _Session(run, settings, corpus, tokenizer)
    with _interruptible() as received:
        finished = session.train(received)
    if not finished:
        print(f"interrupted; go on with: attnax train --resume {run.path}")
        return 128 + received[0]
    session.finish()
    return 0


def _start(options: Train) -> tuple[RunFolder, RunOptions, Corpus, Tokenizer]:
    """Everything that can be refused is looked at before the run folder is made."""
    if options.out is not None and options.out.exists():
        raise InputError(f"{options.out} exists already; nothing was overwritten. Name another --out.")
    corpus = _read(options.data, options.held_out)
    texts = _texts(corpus.train)
    tokenizer = byte_tokenizer() if options.tokenizer == "bytes" else train_bpe(texts, options.model.vocab_size)
    model = dataclasses.replace(options.model, vocab_size=tokenizer.vocab_size)
    data = None if options.data is None else str(Path(options.data).absolute())
    settings = dataclasses.replace(options, model=model, data=data)
    run = RunFolder.create(options.out)
    run.save(settings, corpus, tokenizer)
    return run, settings, corpus, tokenizer


def _reopen(options: Train) -> tuple[RunFolder, RunOptions, Corpus, Tokenizer]:
    assert options.resume is not None
    if options != Train(resume=options.resume):
        raise InputError("--resume goes on with the run's own options; leave the other flags out.")
    run = RunFolder(options.resume)
    settings, tokenizer, corpus_digest = run.load()
    if run.result.exists():
        raise InputError(f"{run.path} is finished; there is nothing to go on with.")
    corpus = _read(settings.data, settings.held_out)
    if corpus.fingerprint != corpus_digest:
        raise InputError(f"the text of {run.path} has changed since it was started; start a new run.")
    return run, settings, corpus, tokenizer


def _read(data: str | None, held_out: float) -> Corpus:
    corpus = read_corpus(data, held_out=held_out)
    parts = (f"{len(part):,} files, {_size(part) / 1e6:,.2f} MB" for part in (corpus.train, corpus.held_out))
    print("corpus     {} to learn from; {} held out".format(*parts))
    if corpus.skipped:
        print(f"           {corpus.skipped:,} binary files skipped")
    return corpus


class _Session:
    """One process's part of a run."""

    def __init__(self, run: RunFolder, options: RunOptions, corpus: Corpus, tokenizer: Tokenizer):
        self.run, self.options, self.corpus = run, options, corpus
        window = options.model.max_len
        texts = _texts(corpus.train)
        self.stream = TokenStream(tokenizer.encode_documents(texts), window)
        self.held_out = TokenStream(tokenizer.encode_documents(_texts(corpus.held_out)), window)
        # A look at held-out text while training: about 32 windows of it, and the bytes that they spell.
        self.probe = TokenStream(self.held_out.tokens[: 32 * window + 1], window)
        self.probe_bytes = len(tokenizer.decode(self.probe.tokens))
        bytes_per_token = _size(corpus.train) / len(self.stream.tokens)
        print(f"tokenizer  {tokenizer.vocab_size:,} ids, {bytes_per_token:.2f} bytes a token")
        self.trainer = Trainer(options.model, options.optimizer, options.seed)
        self.state = self.trainer.init()
        print(f"model      {sum(x.size for x in jax.tree.leaves(self.state.params)):,} parameters")
        print(f"run        {run.path}")

    @property
    def step(self) -> int:
        """Updates made."""
        return int(self.state.passes) // self.options.optimizer.accumulate

    def train(self, received: list[int]) -> bool:
        """Goes on to the last update; False if a signal came in, after a checkpoint was saved."""
        optimizer, window = self.options.optimizer, self.options.model.max_len
        tokens_per_step = optimizer.batch_size * optimizer.accumulate * window
        schedule = optimizer.schedule()
        seconds = self._restore()
        bar = tqdm(
            total=optimizer.steps * tokens_per_step,
            initial=self.step * tokens_per_step,
            desc="loss ---- ",
            unit="tok",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        started = time.perf_counter() - seconds
        with bar:
            for step in range(self.step, optimizer.steps):
                losses, norm = [], 0.0
                for index in range(step * optimizer.accumulate, (step + 1) * optimizer.accumulate):
                    batch = self.stream.batch(index, optimizer.batch_size, self.options.seed)
                    self.state, metrics = self.trainer.step(self.state, batch)
                    losses.append(float(metrics.loss))
                    norm = float(metrics.grad_norm)
                row = {"step": step + 1, "tokens": (step + 1) * tokens_per_step}
                self.run.append_metrics(
                    **row,
                    loss=float(np.mean(losses)),
                    grad_norm=norm,
                    learning_rate=float(schedule(step)),
                    seconds=round(time.perf_counter() - started, 3),
                )
                bar.set_description(f"loss {np.mean(losses):.3f}", refresh=False)
                bar.update(tokens_per_step)
                last = step + 1 == optimizer.steps
                if last or received or (step + 1) % self.options.checkpoint_every == 0:
                    self._save()
                if received and not last:
                    return False
                if not last and (step + 1) % self.options.checkpoint_every == 0:
                    self._probe(row)
        return True

    def finish(self) -> None:
        """Scores all held-out text, lets the model write, and keeps the figures with the run."""
        held_out = b"".join(_texts(self.corpus.held_out))
        bits = self.trainer.bits(self.state.params, self.held_out)
        figures = {
            "held_out_bytes": len(held_out),
            "held_out_bits_per_byte": bits / len(held_out),
            "gzip_bits_per_byte": 8 * len(gzip.compress(held_out, 9)) / len(held_out),
            "xz_bits_per_byte": 8 * len(lzma.compress(held_out, preset=9)) / len(held_out),
        }
        rows = self.run.read_metrics()
        rows.append({**rows[-1], "held_out_bits_per_byte": figures["held_out_bits_per_byte"]})
        plot_training(rows, self.run.path / "loss.png")
        model, tokenizer = load_model(self.run.path)
        sample = "".join(write_text(model, tokenizer, "", None, Sampler(0.8, top_p=0.95), self.options.seed))
        (self.run.path / "sample.txt").write_text(sample, "utf-8", "surrogateescape")
        self.run.result.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        print(f"\n{sample}\n")
        print(f"go on with  attnax generate {self.run.path} --prompt 'def '")
        print(
            "held-out {held_out_bits_per_byte:.2f} bits per byte "
            "(gzip -9: {gzip_bits_per_byte:.2f}, xz -9: {xz_bits_per_byte:.2f})".format(**figures)
        )

    def _restore(self) -> float:
        """Goes back to the newest checkpoint, if there is one; returns the seconds trained until then."""
        step = latest_checkpoint(self.run.checkpoints)
        if step is None:
            return 0.0
        for_params = {"params": self.state.params, "training": (self.state.opt_state, self.state.passes)}
        restored = {
            item: restore_checkpoint(self.run.checkpoints, step, item, like) for item, like in for_params.items()
        }
        opt_state, passes = restored["training"]
        self.state = TrainState(restored["params"], opt_state, passes)
        rows = [row for row in self.run.rewind_metrics(step) if "seconds" in row]
        return rows[-1]["seconds"] if rows else 0.0

    def _save(self) -> None:
        items = {"params": self.state.params, "training": (self.state.opt_state, self.state.passes)}
        save_checkpoint(self.run.checkpoints, self.step, items)

    def _probe(self, row: dict[str, Any]) -> None:
        bits = self.trainer.bits(self.state.params, self.probe)
        self.run.append_metrics(**row, held_out_bits_per_byte=bits / self.probe_bytes)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one kills as usual."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def _texts(documents: tuple[Document, ...]) -> list[bytes]:
    return [document.text for document in documents]


def _size(documents: tuple[Document, ...]) -> int:
    return sum(len(document.text) for document in documents)
