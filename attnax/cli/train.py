"""`attnax train`: from text to a language model, a curve, a sample and a figure; in one process or in several."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
from pathlib import Path

import jax

from attnax.cli import terminal
from attnax.cli.divergence import DIVERGED, advice
from attnax.cli.dry_run import print_plan
from attnax.cli.finish import finish
from attnax.cli.layout import layout_here
from attnax.cli.options import Train
from attnax.cli.progress import counting
from attnax.cli.run_tokens import read_tokens
from attnax.cli.session import Session
from attnax.cli.tokenize import describe
from attnax.distributed import ProcessError, StopRequests, barrier, connect, disconnect, gather, is_main
from attnax.errors import InputError
from attnax.training import DivergenceError, RunFolder, latest_checkpoint
from attnax.training.corpus import PARTS
from attnax.training.run_data import RunData, choose_data, reopen_data
from attnax.training.same_disk import require_seen

_NOTICE = "interrupted; stops after this update, once it is compiled. Ctrl-C again ends at once."
_PATIENCE = 24 * 3600.0  # seconds in which process 0 must have made the tokens, and in the end the results


def train(options: Train) -> int:
    """Runs the command.

    Returns:
        0; 1 if the disk or another process failed, `DIVERGED` if the training diverged, or 128 + the number of the
        signal that stopped it.
    """
    if options.dry_run:
        print_plan(options)
        return 0
    if options.tensorboard:  # an optional dependency: that it is missing is said before the run begins
        importlib.import_module("attnax.cli.board")
    terminal.keep_programs(options.compile_cache)
    terminal.silence_orbax()
    with contextlib.ExitStack() as stack:
        try:
            connect()
            if not is_main():  # process 0 prints for all
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            code = _train(options)
            if code in (0, 128 + signal.SIGTERM):  # all processes end so
                disconnect(_PATIENCE)
        except ProcessError as error:
            terminal.warn(str(error))
            return 1
    return code


def _train(options: Train) -> int:
    with contextlib.ExitStack() as stack:
        session = _begin(options, stack)
        if session is None:
            return 0
        go_on = session.command()
        try:
            _load(session, stack)
            with StopRequests(_NOTICE) as requests:
                session.train(requests)
            if requests.code:
                print(f"interrupted; go on with: {go_on}")
                return requests.code
            finish(session)
        except DivergenceError as error:
            skip = f" Or leave out up to N such updates: {go_on} --max-skipped N" if error.is_skippable else ""
            unsaved = _wait_for_save(session)
            if is_main():
                kept = latest_checkpoint(session.run.checkpoints)
                terminal.warn(f"{error} {advice(session.options, kept)}{skip}{unsaved}")
            return DIVERGED
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                if jax.process_count() > 1:
                    terminal.warn(f"another process may have ended; look at its log. Go on with: {go_on}")
                raise
            size, words = session.options.optimizer.batch_size, " ".join(str(error).split())[:200]
            raise InputError(
                f"the device has too little memory for an update with --batch-size {size}. Take a smaller one with a "
                f"larger --accumulate, --remat full, or more devices by --layout. XLA says: {words}"
            ) from error
        except OSError as error:
            if error.filename is None:  # not about a file of the run
                raise
            terminal.warn(f"{error.filename}: {error.strerror}. Mend it, then go on with: {go_on}")
            return 1
        except KeyboardInterrupt:
            print(f"interrupted; go on with: {go_on}")
            return 128 + signal.SIGINT
    return 0


def _begin(options: Train, stack: contextlib.ExitStack) -> Session | None:
    """A new run, or one to go on with, locked; None if it is finished.

    Process 0 makes the folder, and its tokens before the others go on.
    """
    session: Session | None = None
    if is_main():
        session = _start(options, stack) if options.resume is None else _open(options, options.resume, stack)
    mine = {}
    if session is not None:
        path, goes_on = session.run.path.absolute(), options.resume is not None
        digest = (path / "config.json").stat().st_size, session.run.owner
        mine = {"path": str(path), "goes_on": goes_on, "step": options.step, "digest": digest}
    said = json.loads(gather("run", json.dumps(mine), _PATIENCE)[0])
    if said and not is_main():
        folder, (size, sha) = Path(said["path"]), said["digest"]
        barrier("tokens", _PATIENCE)
        require_seen(folder / "config.json", (size, sha))  # another machine's disk may show it late
        here = dataclasses.replace(options, resume=folder if said["goes_on"] else None, step=said["step"])
        session = _open(here, folder, stack)
    return session


def _load(session: Session, stack: contextlib.ExitStack) -> None:
    """Opens what the run learns from, and makes or restores its state."""
    session.tokens = read_tokens(session.data, session.run, session.options, session.trainer.part)
    if is_main():
        barrier("tokens", _PATIENCE)
    barrier("opened", _PATIENCE)
    session.checkpoints = stack.enter_context(session.open_checkpoints())
    if session.here.resume is None:
        session.begin()
    else:
        session.restore(session.here.step)


def _start(options: Train, stack: contextlib.ExitStack) -> Session:
    """A new run, locked. Everything that can be refused is checked before its folder is made."""
    if options.out is not None and options.out.exists():
        RunFolder(options.out).require_free()
    for name in ("dtype", "param_dtype"):
        if getattr(options.model, name) == "float64" and not jax.config.values["jax_enable_x64"]:
            raise InputError(f"--{name.replace('_', '-')} float64 needs JAX_ENABLE_X64=1 in the environment.")
    layout = layout_here(options.layout, options)
    data = choose_data(options, counting)
    _describe(data)
    model = dataclasses.replace(options.model, vocab_size=data.tokenizer.vocab_size)
    path = None if options.data is None else str(Path(options.data).absolute())
    settings = dataclasses.replace(options, model=model, data=path)
    data.require_a_window(model.max_len)
    session = Session(settings, options, data, layout)
    session.run = RunFolder.create(options.out, settings, data, data.tokenizer, {})
    stack.enter_context(session.run.locked())
    return session


def _open(options: Train, folder: Path, stack: contextlib.ExitStack) -> Session | None:
    """The run in a folder, locked by process 0; None if it is finished, which is said."""
    run = RunFolder(folder)
    loaded = run.load()
    settings = loaded[0]
    if run.parts:
        names = ", ".join(f"{part}={name}" for part, name in run.parts.items())
        raise InputError(f"{folder} has a model with {names}, which is code and not in the folder; go on in Python.")
    if run.result.exists():
        if options.step is not None:
            raise InputError(f"{folder} is finished, and --step goes back in a run that is not. Leave it out.")
        print(f"{folder} is finished; write with it:  {terminal.command_name()} generate {folder}")
        return None
    layout = layout_here(options.layout, settings)
    if is_main():
        stack.enter_context(run.locked())
    data = reopen_data(run, loaded, counting, verify=is_main())
    _describe(data)
    session = Session(settings, options, data, layout)
    session.run = run
    if options.max_skipped is not None:
        session.max_skipped = options.max_skipped
    return session


def _wait_for_save(session: Session) -> str:
    """Waits for the checkpoint that is being written; returns a sentence if it could not be."""
    try:
        session.checkpoints.wait()
    except OSError as error:
        return f" The last checkpoint could not be saved: {error.filename}: {error.strerror}."
    return ""


def _describe(data: RunData) -> None:
    if data.corpus is not None:
        describe(data.corpus)
    elif data.store is not None:
        counts = (f"{data.store.num_documents(part):,}" for part in PARTS)
        print("store      {} documents to learn from; {} held out".format(*counts))
