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
from tqdm import tqdm

from attnax.cli.generate import write_text
from attnax.cli.options import Train
from attnax.generation import Sampler
from attnax.text import DOCUMENT, Tokenizer, byte_tokenizer, train_bpe
from attnax.training import (
    Corpus,
    Document,
    RunFolder,
    RunOptions,
    TokenStream,
    Trainer,
    TrainState,
    latest_checkpoint,
    open_run,
    read_corpus,
    restore_checkpoint,
    save_checkpoint,
)
from attnax.typing import InputError
from attnax.visualize import plot_training


def train(options: Train) -> int:
    """Runs the command; returns 0, or 128 + the number of the signal that interrupted it."""
    session = _start(options) if options.resume is None else _reopen(options, options.resume)
    with _interruptible() as received:
        finished = session.train(received)
    if not finished:
        print(f"interrupted; go on with: attnax train --resume {session.run.path}")
        return 128 + received[0]
    try:
        session.finish()
    except KeyboardInterrupt:
        print(f"interrupted; go on with: attnax train --resume {session.run.path}")
        return 128 + signal.SIGINT
    return 0


def _start(options: Train) -> _Session:
    """Everything that can be refused is looked at before the run folder is made."""
    if options.out is not None and options.out.exists():
        raise InputError(f"{options.out} exists already; nothing was overwritten. Name another --out.")
    corpus = _read(options.data, options.held_out)
    texts = _texts(corpus.train)
    tokenizer = byte_tokenizer() if options.tokenizer == "bytes" else train_bpe(texts, options.model.vocab_size)
    model = dataclasses.replace(options.model, vocab_size=tokenizer.vocab_size)
    data = None if options.data is None else str(Path(options.data).absolute())
    settings = dataclasses.replace(options, model=model, data=data)
    session = _Session(settings, corpus, tokenizer)
    session.run = RunFolder.create(options.out)
    session.run.save(settings, corpus, tokenizer)
    return session


def _reopen(options: Train, folder: Path) -> _Session:
    if options != Train(resume=folder):
        raise InputError("--resume goes on with the run's own options; leave the other flags out.")
    run = RunFolder(folder)
    settings, tokenizer, corpus_digest = run.load()
    if run.result.exists():
        raise InputError(f"{folder} is finished; there is nothing to go on with.")
    corpus = _read(settings.data, settings.held_out)
    if corpus.fingerprint != corpus_digest:
        raise InputError(f"the text of {folder} has changed since it was started; start a new run.")
    session = _Session(settings, corpus, tokenizer)
    session.run = run
    session.restore()
    return session


def _read(data: str | None, held_out: float) -> Corpus:
    corpus = read_corpus(data, held_out=held_out)
    parts = (f"{len(part):,} files, {_size(part) / 1e6:,.2f} MB" for part in (corpus.train, corpus.held_out))
    print("corpus     {} to learn from; {} held out".format(*parts))
    if corpus.skipped:
        print(f"           {corpus.skipped:,} binary files skipped")
    return corpus


class _Session:
    """One process's part of a run; `run` is set once nothing stands against it."""

    run: RunFolder

    def __init__(self, options: RunOptions, corpus: Corpus, tokenizer: Tokenizer):
        self.options, self.corpus = options, corpus
        window = options.model.max_len
        self.stream = TokenStream(tokenizer.encode_documents(_texts(corpus.train)), window)
        self.stream.require_a_window()
        self.held_out = TokenStream(tokenizer.encode_documents(_texts(corpus.held_out)), window)
        # A look at held-out text while training: about 32 windows of it, and the bytes that they spell.
        self.probe = TokenStream(self.held_out.tokens[: 32 * window + 1], window)
        self.probe_bytes = len(tokenizer.decode(self.probe.tokens))
        bytes_per_token = _size(corpus.train) / len(self.stream.tokens)
        print(f"tokenizer  {tokenizer.vocab_size:,} ids, {bytes_per_token:.2f} bytes a token")
        self.trainer = Trainer(
            options.model,
            options.optimizer,
            options.seed,
            document_token=DOCUMENT if options.pack else None,
        )
        self.state = self.trainer.init()
        self.seconds = 0.0  # trained before this process
        print(f"model      {sum(x.size for x in jax.tree.leaves(self.state.params)):,} parameters")

    @property
    def step(self) -> int:
        """Updates made."""
        return int(self.state.passes) // self.options.optimizer.accumulate

    def restore(self) -> None:
        """Goes back to the newest checkpoint; without one, to the start."""
        step = latest_checkpoint(self.run.checkpoints)
        if step is not None:
            parts = vars(self.state).items()  # params apart, so that generation reads nothing else
            self.state = TrainState(
                **{
                    name: restore_checkpoint(self.run.checkpoints, step, name, like, owner=self.run.owner)
                    for name, like in parts
                }
            )
        rows = [row for row in self.run.rewind_metrics(step or 0) if "seconds" in row]
        self.seconds = rows[-1]["seconds"] if rows else 0.0

    def train(self, received: list[int]) -> bool:
        """Goes on to the last update; False if a signal came in, after a checkpoint was saved."""
        optimizer = self.options.optimizer
        tokens_per_step = optimizer.batch_size * optimizer.accumulate * self.options.model.max_len
        schedule, started = optimizer.schedule(), time.perf_counter() - self.seconds
        print(f"run        {self.run.path}")
        progress = tqdm(
            total=optimizer.steps * tokens_per_step,
            initial=self.step * tokens_per_step,
            unit="tok",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        with progress:
            for step in range(self.step + 1, optimizer.steps + 1):
                loss, grad_norm = self._update(step)
                row = {"step": step, "tokens": step * tokens_per_step}
                self.run.append_metrics(
                    **row,
                    loss=loss,
                    grad_norm=grad_norm,
                    learning_rate=float(schedule(step - 1)),
                    seconds=round(time.perf_counter() - started, 3),
                )
                progress.set_description(f"loss {loss:.3f}", refresh=False)
                progress.update(tokens_per_step)
                stop = bool(received)
                pause = step % self.options.checkpoint_every == 0 or step == optimizer.steps
                if pause or stop:
                    save_checkpoint(self.run.checkpoints, step, vars(self.state), owner=self.run.owner)
                if pause:
                    bits = self.trainer.bits(self.state.params, self.probe)
                    self.run.append_metrics(**row, held_out_bits_per_byte=bits / self.probe_bytes)
                if stop:  # read once: a signal that comes after the checkpoint waits for the next step
                    return False
        return True

    def _update(self, step: int) -> tuple[float, float]:
        """Mean loss of the accumulated batches, and the norm of the last gradient."""
        optimizer, losses = self.options.optimizer, []
        for index in range((step - 1) * optimizer.accumulate, step * optimizer.accumulate):
            batch = self.stream.batch(index, optimizer.batch_size, self.options.seed)
            self.state, metrics = self.trainer.step(self.state, batch)
            losses.append(float(metrics.loss))
        return float(np.mean(losses)), float(metrics.grad_norm)

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
        plot_training(self.run.read_metrics(), self.run.path / "loss.png")
        self.run.result.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        sample = "".join(write_text(open_run(self.run.path), "", None, Sampler(0.8, top_p=0.95), self.options.seed))
        (self.run.path / "sample.txt").write_text(sample, "utf-8")
        print(f"\n{sample}\n")
        print(f"go on with  attnax generate {self.run.path} --prompt 'def '")
        print(
            "held-out {held_out_bits_per_byte:.2f} bits per byte "
            "(gzip -9: {gzip_bits_per_byte:.2f}, xz -9: {xz_bits_per_byte:.2f})".format(**figures)
        )


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
