"""The part of a run that is made between two starts: updates, looks at held-out text, and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax

from attnax.cli import terminal
from attnax.cli.divergence import require_finite
from attnax.cli.options import DRAW, Train
from attnax.cli.progress import Progress
from attnax.cli.run_tokens import RunTokens
from attnax.cli.stopwatch import Stopwatch
from attnax.cli.trace import Trace, read_updates
from attnax.cli.unreadable import unreadable
from attnax.distributed import StopRequests, beat, is_main
from attnax.errors import InputError
from attnax.generation import Sampler
from attnax.launcher.job import LAUNCH
from attnax.sharding import Layout
from attnax.training import (
    Checkpoints,
    DamagedCheckpointError,
    DivergenceError,
    Metrics,
    RunFolder,
    RunOptions,
    TokenStream,
    Trainer,
    TrainState,
    causal_lm,
    plan_training,
    require_memory,
    require_traces,
)
from attnax.training.flops import PEAK_FLOPS
from attnax.training.run_data import RunData

__all__ = ["SAMPLER", "Session"]

SAMPLER = Sampler(**DRAW)  # of the text at the end; `attnax generate` has the same


class _Made(NamedTuple):
    """An update that was dispatched: its number, and its metrics, which the devices may still compute."""

    step: int
    metrics: Metrics


class Session:
    """Trains on from the state that a run has reached; `run` and what follows are set once everything is checked.

    The metrics of an update are read after the next one is dispatched, so that the devices never wait for the host.
    Before a look at held-out text, a checkpoint and the end nothing is left to read: a state is saved only after all
    of its updates were found to be finite. In several processes all make this together, and process 0 writes the rows.

    Args:
        options: of the run.
        here: the flags that are no part of the run.
        data: the text or the store, and its tokenizer.
        layout: of the devices, or None for one.
    """

    run: RunFolder
    checkpoints: Checkpoints
    tokens: RunTokens
    state: TrainState

    def __init__(self, options: RunOptions, here: Train, data: RunData, layout: Layout | None):
        self.options, self.here, self.data, self.layout = options, here, data, layout
        require_memory(options.model, options.optimizer, layout, ema=options.ema is not None)
        losses = {"load_balance_loss": options.load_balance_loss, "router_z_loss": options.router_z_loss}
        objective = causal_lm(
            document_token=data.tokenizer.special.document if options.pack else None, loss_weights=losses
        )
        self.trainer = Trainer(
            options.model, objective, options.optimizer, layout=layout, ema=options.ema, seed=options.seed
        )
        require_traces(self.trainer, SAMPLER)
        self.max_skipped = options.max_skipped or 0
        self.step = self.skipped = 0
        self._made: _Made | None = None
        self._traced = read_updates(here.profile)
        if self._traced and self._traced[0] > options.optimizer.steps:
            raise InputError(
                f"--profile must begin within the {options.optimizer.steps:,} updates of the run; got {here.profile!r}."
            )
        self._schedule = options.optimizer.build_schedule()
        sized = None if layout is None else layout.sized(jax.device_count())
        self.plan = plan_training(options.model, options.optimizer, layout=sized, ema=options.ema is not None)
        print(f"model      {self.plan.num_parameters:,} parameters")
        if layout is not None:
            print(f"layout     {sized}, {jax.device_count()} devices ({jax.devices()[0].device_kind})")

    def command(self, step: int | None = None) -> str:
        """The command that goes on with the run in the same processes and layout, from the checkpoint of `step`."""
        options = "" if step is None else f" --step {step}"
        options += "" if self.layout is None else f" --layout {self.layout}"
        launch = f"launch {os.environ[LAUNCH]} -- " if LAUNCH in os.environ else ""
        return f"{terminal.command_name()} {launch}train --resume {self.run.path}{options}"

    def open_checkpoints(self) -> Checkpoints:
        """The checkpoints of the run: the two newest are kept, the best, and those of --keep-every."""
        layout = "" if self.layout is None else str(self.layout.sized(jax.device_count()))
        return Checkpoints(
            self.run.checkpoints,
            owner=self.run.owner,
            layout=layout,
            keep_best=1,
            keep_every=self.options.keep_every,
        )

    def restore(self, step: int | None = None) -> None:
        """Goes back to the checkpoint of `step`, by default the newest that is whole, or to the start if there is none.

        Later checkpoints are deleted after the next update. A warning names newer ones that are damaged.

        Raises:
            InputError: there is no checkpoint of this step, or it is damaged; the message says how to go on from
                another one.
            OSError: the disk fails; the message says how to go on from an older one.
        """
        try:
            with terminal.warnings_as_lines():
                found = self.checkpoints.restore(_parts(self.trainer.shapes), step=step)
        except DamagedCheckpointError as error:
            if error.whole is None:
                raise InputError(f"{error} Start a new run.") from error
            raise InputError(f"{error} Go on from it with: {self.command(error.whole)}") from error
        except OSError as error:
            raise unreadable(error, self.run.checkpoints, step, self.command) from error
        if found is None:
            self.begin()
            return
        self.step, parts = found
        self.state = TrainState(**parts)
        self.skipped = int(self.state.skipped)
        if self._traced and self._traced[-1] <= self.step:
            terminal.warn(f"--profile {self.here.profile}: these updates were made before; there will be no trace.")
        if not self._rows():
            print(
                f"metrics    {self.run.path / 'metrics.jsonl'} has no rows any more; they begin after step {self.step}"
            )

    def begin(self) -> None:
        """Makes the state before the first update."""
        self.state = self.trainer.init()

    def train(self, requests: StopRequests) -> None:
        """Goes on to the last update, or until a stop is requested; the state is then saved.

        Raises:
            DivergenceError: a loss, a gradient or the parameters are not finite.
        """
        options, steps = self.options, self.options.optimizer.steps
        print(f"run        {self.run.path}")
        if self.step < steps:
            print(terminal.compiling(), flush=True)
        with contextlib.ExitStack() as stack:
            self._progress = stack.enter_context(contextlib.closing(Progress(steps, self.plan.tokens, is_main())))
            self._stopwatch = self._start_stopwatch()
            traced = self._traced if is_main() else range(0)
            trace = stack.enter_context(contextlib.closing(Trace(traced, self.run.path / "profile")))
            self._board = self._open_board(stack)
            self._prefetched = stack.enter_context(self.tokens.batches.start(self.step))
            first, stop = self.step + 1, False
            while self.step < steps and not stop:
                trace.before(self.step + 1, self._read)
                made = self._dispatch()
                if made.step == first:  # only now: nothing is deleted by a command that could not go on
                    self.checkpoints.discard_after(first - 1)
                    if is_main():
                        self.run.rewind_metrics(first - 1)
                self._read()
                self._made = made
                trace.after(self.step, self._read)
                stop = requests.agree_to_stop(self.step)
                is_last = self.step == steps
                is_save = stop or is_last or self.step % options.checkpoint_every == 0
                is_look = is_last or self.step % (options.eval_every or options.checkpoint_every) == 0
                if is_save or is_look:
                    self._read()
                    with self._progress.paused(), self._stopwatch.paused():
                        # The look is first: a process that is killed between the two evaluates again.
                        metric = self._look_at_held_out() if is_look else None
                        if is_save:
                            self.checkpoints.save(self.step, _parts(self.state), metric=metric)
                self.checkpoints.check()
            self.checkpoints.wait()

    def _start_stopwatch(self) -> Stopwatch:
        peak = self.here.peak_flops or PEAK_FLOPS.get(jax.devices()[0].device_kind)
        return Stopwatch(
            started=self.run.started,
            rows=self._rows(),
            tokens=self.plan.tokens,
            flops=self.plan.flops.total,
            peak=None if peak is None else peak * self.plan.num_devices,
        )

    def _rows(self) -> list[dict[str, Any]]:
        """The metrics up to the state; process 0 has them."""
        return [] if not is_main() else [row for row in self.run.read_metrics() if row["step"] <= self.step]

    def _open_board(self, stack: contextlib.ExitStack) -> Any:
        """The files for TensorBoard, or None without --tensorboard. Process 0 writes them."""
        if not (self.here.tensorboard and is_main()):
            return None
        from attnax.cli.board import Board  # an optional dependency

        return stack.enter_context(contextlib.closing(Board(self.run.path / "tensorboard", self.step)))

    def _dispatch(self) -> _Made:
        """Begins the next update."""
        self.state, metrics = self.trainer.step(self.state, next(self._prefetched))
        self.step += 1
        return _Made(self.step, metrics)

    def _read(self) -> None:
        """Waits for the update that was dispatched, and writes its row of metrics; does nothing if there is none.

        Raises:
            DivergenceError: the run must stop; the row is written.
        """
        made, self._made = self._made, None
        if made is None:
            return
        metrics = jax.device_get(made.metrics)
        times = self._stopwatch.measure()
        loss = float(metrics.loss)
        rate = float(self._schedule(made.step - 1 - self.skipped))
        self.skipped += int(metrics.is_skipped)
        self._log(
            step=made.step,
            tokens=made.step * self.plan.tokens,
            loss=_finite(loss),
            weight=_finite(metrics.weight),
            grad_norm=_finite(metrics.grad_norm),
            learning_rate=rate,
            **{name: _finite(value) for name, value in metrics.aux.items()},
            **({"skipped": self.skipped} if self.skipped else {}),
            **({} if self.layout is None else {"layout": str(self.layout.sized(jax.device_count()))}),
            **times,
        )
        beat()
        require_finite(made.step, metrics, skipped=self.skipped, max_skipped=self.max_skipped)
        self._progress.advance(made.step, loss)

    def _log(self, **row: Any) -> None:
        if not is_main():
            return
        self.run.append_metrics(**row)
        if self._board is not None:
            self._board.add(row)

    def _look_at_held_out(self) -> float:
        """Writes a row about some of the held-out text; returns the bits per byte of the parameters."""
        figures = self.bits_per_byte(self.tokens.probe, self.tokens.probe_bytes)
        self._log(step=self.step, tokens=self.step * self.plan.tokens, **figures)
        return figures["held_out_bits_per_byte"]

    def bits_per_byte(self, stream: TokenStream, num_bytes: int) -> dict[str, float]:
        """The figures of some text: of the parameters, and of their average if there is one.

        Raises:
            DivergenceError: one is not finite.
        """
        figures = {"held_out_bits_per_byte": self.trainer.bits(self.state.params, stream) / num_bytes}
        if self.options.ema is not None:
            figures["ema_held_out_bits_per_byte"] = self.trainer.bits(self.state.ema, stream) / num_bytes
        for bits in figures.values():
            if not math.isfinite(bits):
                raise DivergenceError(f"step {self.step}: the loss on held-out text is {bits}.")
        return figures


def _parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state by name."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _finite(number: Any) -> float | None:
    """The number, or None: JSON has no NaN or infinity."""
    return float(number) if math.isfinite(number) else None
