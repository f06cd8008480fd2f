"""`attnax train`: from text to a language model, a curve, a sample and a figure."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import lzma
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from attnax.cli import terminal
from attnax.cli.generate import write_text
from attnax.cli.options import DRAW, Train, read_layout
from attnax.errors import InputError
from attnax.generation import Sampler
from attnax.sharding import Layout
from attnax.text import DOCUMENT, Tokenizer, byte_tokenizer, train_bpe
from attnax.training import (
    Corpus,
    DamagedCheckpointError,
    DivergenceError,
    Document,
    RunFolder,
    RunOptions,
    TokenStream,
    Trainer,
    causal_lm,
    checkpoint_steps,
    delete_checkpoints_after,
    latest_checkpoint,
    make_mesh,
    open_run,
    read_corpus,
    require_memory,
    require_traces,
    restore_items,
    save_checkpoint,
    write_whole,
)
from attnax.visualize import plot_training

SAMPLER = Sampler(**DRAW)  # of the text at the end; `attnax generate` has the same
_SAVED = ("params", "opt_state", "update", "skipped")


def train(options: Train) -> int:
    """Runs the command; returns 0, 1 if the training diverged, or 128 + the number of the signal that stopped it."""
    terminal.keep_programs(options.compile_cache)
    with contextlib.ExitStack() as stack:
        session = _start(options, stack) if options.resume is None else _open(options, options.resume, stack)
        go_on = session.command()
        try:
            with _interruptible() as received:
                finished = session.train(received)
            if not finished:
                print(f"interrupted; go on with: {go_on}")
                return 128 + received[0]
            session.finish()
        except DivergenceError as error:
            skip = f" Or leave out up to N such updates: {go_on} --max-skipped N" if error.is_skippable else ""
            terminal.warn(f"{error} {session.words_for_divergence()}{skip}")
            return 1
        except OSError as error:
            if error.filename is None:  # not about a file of the run
                raise
            raise InputError(f"{error.filename}: {error.strerror}. Mend it, then go on with: {go_on}") from error
        except KeyboardInterrupt:
            print(f"interrupted; go on with: {go_on}")
            return 128 + signal.SIGINT
    return 0


def _start(options: Train, stack: contextlib.ExitStack) -> _Session:
    """A new run, locked. Everything that can be refused is checked before its folder is made."""
    if options.out is not None and options.out.exists():
        RunFolder(options.out).require_free()
    for name in ("dtype", "param_dtype"):
        if getattr(options.model, name) == "float64" and not jax.config.values["jax_enable_x64"]:
            raise InputError(f"--{name.replace('_', '-')} float64 needs JAX_ENABLE_X64=1 in the environment.")
    layout = _read_layout(options, options)
    corpus = _read(options.data, options.held_out)
    texts = _texts(corpus.train)
    tokenizer = byte_tokenizer() if options.tokenizer == "bytes" else train_bpe(texts, options.model.vocab_size)
    model = dataclasses.replace(options.model, vocab_size=tokenizer.vocab_size)
    data = None if options.data is None else str(Path(options.data).absolute())
    settings = dataclasses.replace(options, model=model, data=data)
    session = _Session(settings, corpus, tokenizer, layout)
    session.run = RunFolder.create(options.out, settings, corpus, tokenizer, {})
    stack.enter_context(session.run.locked())
    return session


def _open(options: Train, folder: Path, stack: contextlib.ExitStack) -> _Session:
    """The run in a folder, locked, restored from its checkpoint."""
    run = RunFolder(folder)
    settings, tokenizer, corpus_digest = run.load()
    if run.parts:
        names = ", ".join(f"{part}={name}" for part, name in run.parts.items())
        raise InputError(f"{folder} has a model with {names}, which is code and not in the folder; go on in Python.")
    if run.result.exists():
        raise InputError(f"{folder} is finished; there is nothing to go on with.")
    layout = _read_layout(options, settings)
    stack.enter_context(run.locked())
    corpus = _read(settings.data, settings.held_out)
    if corpus.fingerprint != corpus_digest:
        raise InputError(f"the text of {folder} has changed since it was started; start a new run.")
    session = _Session(settings, corpus, tokenizer, layout)
    session.run = run
    if options.max_skipped is not None:
        session.max_skipped = options.max_skipped
    session.restore(options.step)
    return session


def _read_layout(options: Train, settings: RunOptions) -> Layout | None:
    """The layout of the flags, checked against the devices, the model and the batch, or None for one device.

    Raises:
        InputError: it does not divide them.
    """
    layout, count = read_layout(options.layout), jax.device_count()
    if layout is None:
        return None
    try:
        layout.sized(count)
    except ValueError as error:
        more = ""
        if jax.default_backend() == "cpu":
            known = math.prod(size for size in dataclasses.astuple(layout) if size != -1)
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={known}"
            more = f" {flag} in the environment makes {known} devices of a CPU."
        raise InputError(f"--layout: {error}{more}") from error
    try:
        make_mesh(layout, settings.model, batch_size=settings.optimizer.batch_size)
        if settings.model.max_len % layout.sized(count).context:
            raise ValueError(
                f"Layout: context must divide the length of the windows; got {layout.sized(count)} and "
                f"--max-len {settings.model.max_len}. Take a multiple."
            )
    except ValueError as error:
        raise InputError(f"--layout: {error}") from error
    return layout


def _read(data: str | None, held_out: float) -> Corpus:
    corpus = read_corpus(data, held_out=held_out)
    parts = (f"{len(part):,} documents, {_size(part) / 1e6:,.3g} MB" for part in (corpus.train, corpus.held_out))
    print("corpus     {} to learn from; {} held out".format(*parts))
    if corpus.skipped:
        print(f"           {corpus.skipped:,} binary files skipped")
    return corpus


class _Session:
    """The part of a run that one process makes; `run` is set once everything is checked."""

    run: RunFolder

    def __init__(self, options: RunOptions, corpus: Corpus, tokenizer: Tokenizer, layout: Layout | None):
        self.options, self.corpus, self.layout = options, corpus, layout
        window = options.model.max_len
        self.stream = TokenStream(tokenizer.encode_documents(_texts(corpus.train)), window)
        self.stream.require_a_window()
        self.held_out = TokenStream(tokenizer.encode_documents(_texts(corpus.held_out)), window)
        # The held-out text of an evaluation during training: about 32 windows, and the number of their bytes.
        self.probe = TokenStream(self.held_out.tokens[: 32 * window + 1], window)
        self.probe_bytes = len(tokenizer.decode(self.probe.tokens))
        bytes_per_token = _size(corpus.train) / len(self.stream.tokens)
        print(f"tokenizer  {tokenizer.vocab_size:,} ids, {bytes_per_token:.2f} bytes a token")
        require_memory(options.model, options.optimizer, layout)
        losses = {"load_balance_loss": options.load_balance_loss, "router_z_loss": options.router_z_loss}
        objective = causal_lm(document_token=DOCUMENT if options.pack else None, loss_weights=losses)
        self.trainer = Trainer(options.model, objective, options.optimizer, layout=layout, seed=options.seed)
        require_traces(self.trainer, SAMPLER)
        self.state = self.trainer.init()
        self.max_skipped = options.max_skipped or 0
        self.seconds = 0.0  # of training before this process
        self._tokens_per_step = options.optimizer.batch_size * options.optimizer.accumulate * window
        self._schedule = options.optimizer.build_schedule()
        print(f"model      {sum(x.size for x in jax.tree.leaves(self.state.params)):,} parameters")
        if layout is not None:
            count = jax.device_count()
            print(f"layout     {layout.sized(count)}, {count} devices ({jax.devices()[0].device_kind})")

    @property
    def step(self) -> int:
        """Number of updates made."""
        return int(self.state.update)

    def command(self, step: int | None = None) -> str:
        """The command that goes on with the run on the same layout, from the checkpoint of `step`."""
        options = "" if step is None else f" --step {step}"
        options += "" if self.layout is None else f" --layout {self.layout}"
        return f"{terminal.command_name()} train --resume {self.run.path}{options}"

    def restore(self, step: int | None = None) -> None:
        """Goes back to the checkpoint of `step`, by default the newest, or to the start if there is none.

        Later checkpoints are deleted.

        Raises:
            InputError: there is no checkpoint of this step, or it is damaged; the message says how to go on from an
                older one.
        """
        folder, done = self.run.checkpoints, 0
        if step is not None or checkpoint_steps(folder):
            likes = {name: getattr(self.state, name) for name in _SAVED}
            try:
                done, parts = restore_items(folder, likes, step=step, owner=self.run.owner)
            except DamagedCheckpointError as error:
                if error.whole is None:
                    raise InputError(f"{error} Start a new run.") from error
                raise InputError(f"{error} Go on from it with: {self.command(error.whole)}") from error
            self.state = dataclasses.replace(self.state, **parts)
        delete_checkpoints_after(folder, done)
        rows = self.run.rewind_metrics(done)
        self.seconds = next((row["seconds"] for row in reversed(rows) if "seconds" in row), 0.0)
        if done and not rows:
            print(f"metrics    {self.run.path / 'metrics.jsonl'} has no rows any more; they begin after step {done}")

    def train(self, received: list[int]) -> bool:
        """Goes on to the last update; returns False if a signal came, after saving a checkpoint.

        Raises:
            DivergenceError: a loss, a gradient or the parameters are not finite.
        """
        optimizer, started = self.options.optimizer, time.perf_counter() - self.seconds
        print(f"run        {self.run.path}")
        if self.step < optimizer.steps:
            print(terminal.compiling(), flush=True)
        with contextlib.closing(_Progress(optimizer.steps, self._tokens_per_step)) as progress:
            for step in range(self.step + 1, optimizer.steps + 1):
                loss = self._update_and_log(step, started)
                stop = bool(received)  # read once: a signal that comes after the checkpoint waits for the next step
                with progress.paused():
                    is_look = step % self.options.checkpoint_every == 0 or step == optimizer.steps
                    if is_look:  # before the checkpoint: a process killed between the two evaluates again
                        self._look_at_held_out(step)
                    if is_look or stop:
                        saved = {name: getattr(self.state, name) for name in _SAVED}
                        save_checkpoint(self.run.checkpoints, step, saved, owner=self.run.owner)
                progress.advance(step, loss)
                if stop:
                    return False
        return True

    def _update_and_log(self, step: int, started: float) -> float:
        """Makes an update and writes its row of metrics; returns the loss.

        Raises:
            DivergenceError: the run must stop; the row is written.
        """
        updates = step - 1 - int(self.state.skipped)
        loss, grad_norm, error = self._update(step)
        skipped = int(self.state.skipped)
        self.run.append_metrics(
            step=step,
            tokens=step * self._tokens_per_step,
            loss=loss if math.isfinite(loss) else None,  # JSON has no NaN or infinity
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            learning_rate=float(self._schedule(updates)),
            seconds=round(time.perf_counter() - started, 3),
            **({"skipped": skipped} if skipped else {}),
            **({} if self.layout is None else {"layout": str(self.layout.sized(jax.device_count()))}),
        )
        if error is not None:
            raise error
        return loss

    def _look_at_held_out(self, step: int) -> None:
        bits = self.trainer.bits(self.state.params, self.probe)
        if not math.isfinite(bits):
            raise DivergenceError(f"step {step}: the loss on held-out text is {bits}.")
        tokens = step * self._tokens_per_step
        self.run.append_metrics(step=step, tokens=tokens, held_out_bits_per_byte=bits / self.probe_bytes)

    def _update(self, step: int) -> tuple[float, float, DivergenceError | None]:
        """The mean loss of the update's batches, the norm of its gradient, and the error that stops the run."""
        optimizer, seed = self.options.optimizer, self.options.seed
        indices = range((step - 1) * optimizer.accumulate, step * optimizer.accumulate)
        tokens = np.stack([self.stream.batch(index, optimizer.batch_size, seed) for index in indices])
        self.state, metrics = self.trainer.step(self.state, {"tokens": tokens})
        loss, grad_norm, error = float(metrics.loss), float(metrics.grad_norm), None
        if metrics.is_skipped and int(self.state.skipped) > self.max_skipped:
            cause = "the parameters would not be finite"
            if not math.isfinite(grad_norm):
                cause = f"the norm of the gradient is {grad_norm}"
            if not math.isfinite(loss):
                cause = f"the loss is {loss}"
            made = "the update was not made" if self.max_skipped == 0 else f"of {self.max_skipped} to skip none is left"
            error = DivergenceError(f"step {step}: {cause}, and {made}.", is_skippable=True)
        elif not (metrics.is_finite or metrics.is_skipped):
            error = DivergenceError(f"step {step}: the update made parameters that are not finite.")
        return loss, grad_norm, error

    def words_for_divergence(self) -> str:
        """Advice after a divergence, and which checkpoint is kept."""
        model, optimizer = self.options.model, self.options.optimizer
        tries = [f"a smaller --learning-rate than {optimizer.learning_rate:g}", "a larger --warmup"]
        if "float16" in (model.param_dtype, model.dtype):
            tries.append("--dtype and --param-dtype bfloat16 or float32 in place of float16")
        step = latest_checkpoint(self.run.checkpoints)
        kept = "No checkpoint was saved yet." if step is None else f"The checkpoint of step {step} is kept."
        return f"In a new run, try {' or '.join(tries)}. {kept}"

    def finish(self) -> None:
        """Scores all held-out text, lets the model write, and saves the figures with the run."""
        held_out = b"".join(_texts(self.corpus.held_out))
        bits = self.trainer.bits(self.state.params, self.held_out)
        figures = {
            "held_out_bytes": len(held_out),
            "held_out_bits_per_byte": bits / len(held_out),
            "gzip_bits_per_byte": 8 * len(gzip.compress(held_out, 9)) / len(held_out),
            "xz_bits_per_byte": 8 * len(lzma.compress(held_out, preset=9)) / len(held_out),
            "skipped_updates": int(self.state.skipped),
        }
        if not math.isfinite(bits):
            raise DivergenceError(f"step {self.step}: the loss on held-out text is {bits}.")
        metrics = self.run.read_metrics()
        if any(row.get("loss") is not None for row in metrics):
            plot_training(metrics, self.run.path / "loss.png")
        sample = "".join(write_text(open_run(self.run.path), "", None, SAMPLER, self.options.seed))
        (self.run.path / "sample.txt").write_text(sample, "utf-8")
        write_whole(self.run.result, json.dumps(figures, indent=2) + "\n")  # written last: it marks the run as finished
        print(f"\n{sample}\n")
        prompt = " --prompt 'def '" if self.options.data is None else ""
        print(f"go on with  {terminal.command_name()} generate {self.run.path}{prompt}")
        if figures["skipped_updates"]:
            print("{skipped_updates} updates were left out: they were not finite".format(**figures))
        print(
            "held-out {held_out_bits_per_byte:.2f} bits per byte "
            "(gzip -9: {gzip_bits_per_byte:.2f}, xz -9: {xz_bits_per_byte:.2f})".format(**figures)
        )


class _Progress:
    """A line on standard error that shows the progress and its rate.

    The rate counts no pauses and no compilation, since the line begins after the first step.
    """

    def __init__(self, steps: int, tokens_per_step: int):
        self._steps, self._tokens_per_step, self._pause = steps, tokens_per_step, 0.0
        self._bar: tqdm[Any] | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        begun = time.time()
        yield
        self._pause = time.time() - begun

    def advance(self, step: int, loss: float) -> None:
        """One more step is done."""
        if self._bar is None:
            self._bar = tqdm(
                total=self._steps * self._tokens_per_step,
                initial=step * self._tokens_per_step,
                unit="tok",
                unit_scale=True,
                mininterval=0.5 if sys.stderr.isatty() else 15.0,
            )
        else:
            self._bar.start_t += self._pause
            self._bar.last_print_t += self._pause
            self._bar.update(self._tokens_per_step)
        self._bar.set_description(f"loss {loss:.3f}", refresh=False)

    def close(self) -> None:
        """Ends the line, which stays on the terminal."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of ending the process; a second signal ends it as usual."""
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
