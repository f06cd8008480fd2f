"""A run on disk: what was trained on what, how it went, and the checkpoints.

.lock           held by the process that trains, which .lock.owner names
config.json     the options and the version of attnax, and the SHA-256 of the corpus and of the tokenizer
tokenizer.json  in the format of the `tokenizers` library
metrics.jsonl   a line for each update and each look at held-out text
checkpoints/    through Orbax
loss.png, sample.txt, result.json   when it is done; result.json last
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from attnax import __version__
from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.text.tokenizer import Tokenizer
from attnax.training.corpus import HELD_OUT, Corpus
from attnax.training.optimizer import OptimizerConfig
from attnax.training.run_format import FORMAT, is_format

__all__ = ["LockedError", "RunFolder", "RunOptions", "check_seed", "write_whole"]

LOCK, LOCK_OWNER = ".lock", ".lock.owner"
_BEFORE_CONFIG = {LOCK, LOCK_OWNER, "tokenizer.json", "config.json.tmp"}

# Chosen by comparing runs of other widths, depths, contexts, vocabularies, batches and rates at equal time: what
# needs the fewest held-out bits per byte after about four minutes of training on 2 CPU cores.
DEFAULT_MODEL = TransformerConfig(
    vocab_size=4096,
    d_model=128,
    num_heads=2,
    num_kv_heads=1,
    num_layers=4,
    d_ff=384,
    max_len=128,
    pos_emb_type="rope",
    norm_type="rms",
    ff_activation="swiglu",
    use_bias=False,
    dropout_rate=0.0,
    tie_embeddings=True,
)
DEFAULT_OPTIMIZER = OptimizerConfig(steps=3200, batch_size=8, learning_rate=4e-3, final_learning_rate=0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run learns, and how; kept with it.

    Attributes:
        data: a file, a folder, or a glob in quotes. By default the source of Python's standard library.
        tokenizer: "bpe" learns byte pairs from the training files, "bytes" has one token a byte.
        pack: files that share a row do not attend each other, and each counts its positions from 0.
        held_out: fraction of the files to hold out.
        checkpoint_every: updates between checkpoints, each with a look at held-out text.
        max_skipped: updates that may be left out, because their loss or gradient is not finite, before the run stops.
        seed: of parameters, data order and dropout.
        model: the model; its vocab_size is the tokenizer's.
        optimizer: the training.
    """

    data: str | None = None
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    pack: bool = False
    held_out: float = HELD_OUT
    checkpoint_every: int = 500
    max_skipped: int = 0
    seed: int = 0
    model: TransformerConfig = DEFAULT_MODEL
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        for part in (self, self.model, self.optimizer):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if type(value) is int and value >= 2**31 and field.name != "seed":
                    raise InputError(f"--{field.name.replace('_', '-')} must be below 2 ** 31; got {value}.")
        if not 0.0 < self.held_out < 1.0:
            raise InputError(f"--held-out must be above 0 and below 1; got {self.held_out}.")
        if self.checkpoint_every < 1:
            raise InputError(f"--checkpoint-every must be at least 1; got {self.checkpoint_every}.")
        if self.max_skipped < 0:
            raise InputError(f"--max-skipped must be at least 0; got {self.max_skipped}.")
        if self.data is not None and not self.data:
            raise InputError("--data must not be empty. Leave it out for the source of Python's standard library.")
        if self.model.max_len < 2:
            raise InputError(f"--max-len must be at least 2, to read a token and write one; got {self.model.max_len}.")
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that JAX does not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be at least 0 and below 2 ** 32; got {seed}.")


class LockedError(InputError):
    """Another process trains in the folder."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder, and reading and writing of its small files."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """The figures of a finished run."""
        return self.path / "result.json"

    @classmethod
    def create(cls, out: Path | None, options: RunOptions, corpus: Corpus, tokenizer: Tokenizer) -> RunFolder:
        """Makes `out`, or the next free runs/NNN, with all that `load` reads.

        Free is also a folder that is empty, or that a process left when it was killed before config.json was there:
        that is written last and makes the folder a run.

        Raises:
            InputError: `out` exists already, or cannot be made.
        """
        numbered = (Path("runs") / f"{number:03d}" for number in itertools.count())
        for path in numbered if out is None else [out]:
            try:
                path.mkdir(parents=True, exist_ok=True)
                run = cls(path)
                if run._is_free():
                    with run.locked():
                        if run._is_free():  # still, now that no other process can take it
                            run._save(options, corpus, tokenizer)
                            return run
            except (FileExistsError, LockedError):
                continue
            except OSError as error:
                raise InputError(f"cannot make the run folder {error.filename or path}: {error.strerror}.") from error
        raise InputError(f"{out} exists already; nothing was overwritten. Name another --out.")

    def require_free(self) -> None:
        """Raises InputError for what exists and is no free folder."""
        if not self.path.is_dir() or not self._is_free():
            raise InputError(f"{self.path} exists already; nothing was overwritten. Name another --out.")

    def _is_free(self) -> bool:
        names = {found.name for found in self.path.iterdir()}
        return not names or (LOCK in names and names <= _BEFORE_CONFIG)

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Keeps other processes from training in the folder; the lock of a process that dies is free.

        Raises:
            LockedError: another process has it; the message says which.
        """
        import filelock  # of the extra, which reading a run does not need

        lock, owner = filelock.FileLock(self.path / LOCK), self.path / LOCK_OWNER
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            whose = owner.read_text("utf-8").strip() if owner.is_file() else "another process"
            raise LockedError(f"{self.path} is being trained by {whose}. Wait for it, or stop it.") from error
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            owner.write_text(f"process {os.getpid()} on {platform.node()}, since {since}\n", "utf-8")
            yield self
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _save(self, options: RunOptions, corpus: Corpus, tokenizer: Tokenizer) -> None:
        content = tokenizer.to_json().encode()
        (self.path / "tokenizer.json").write_bytes(content)
        fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(RunOptions)}
        fields |= {name: dataclasses.asdict(fields[name]) for name in ("model", "optimizer")}
        config = {
            "format": FORMAT,
            "attnax": __version__,
            "corpus_sha256": corpus.fingerprint,
            "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
            "options": fields,
        }
        config["sha256"] = _digest(config)
        write_whole(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def load(self) -> tuple[RunOptions, Tokenizer, str]:
        """Reads what `create` wrote: the options, the tokenizer, and the SHA-256 of the corpus.

        Raises:
            InputError: the folder is not a run, is of another version, or a file is missing or changed.
        """
        config_path, tokenizer_path = self.path / "config.json", self.path / "tokenizer.json"
        if not self.path.is_dir():
            raise InputError(f"no such run folder: {self.path}.")
        if not config_path.is_file():
            if self._is_free():
                raise InputError(
                    f"{self.path} holds no run yet: its process was stopped before it began. Start it again as before."
                )
            raise InputError(f"{self.path} is not a run folder: it has no config.json.")
        try:
            config = json.loads(config_path.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{config_path} is damaged: {error}.") from error
        if not isinstance(config, dict) or not is_format(config.get("format")):
            raise InputError(f"{config_path} was not written by attnax train.")
        version = config.get("attnax")
        if config.get("format") != FORMAT:
            raise InputError(_of_another_version(config_path, version, f"its format is {config['format']!r}"))
        if config.pop("sha256", None) != _digest(config):
            raise InputError(f"{config_path} was changed after it was written.")
        try:
            fields = dict(config["options"])
            unknown = [
                *(_unknown(fields, RunOptions)),
                *(_unknown(fields["model"], TransformerConfig)),
                *(_unknown(fields["optimizer"], OptimizerConfig)),
            ]
            if unknown:
                more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
                raise InputError(
                    _of_another_version(config_path, version, f"it has options {', '.join(unknown[:3])}{more}")
                )
            fields["model"] = TransformerConfig(**fields["model"])
            fields["optimizer"] = OptimizerConfig(**fields["optimizer"])
            options = RunOptions(**fields)
            options.check()
            corpus_digest, tokenizer_digest = config["corpus_sha256"], config["tokenizer_sha256"]
        except InputError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(_of_another_version(config_path, version, str(error))) from error
        found = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest() if tokenizer_path.is_file() else None
        if found != tokenizer_digest:
            raise InputError(f"{tokenizer_path} is {'missing' if found is None else 'not the one of this run'}.")
        return options, Tokenizer.load(tokenizer_path), corpus_digest

    @property
    def owner(self) -> str:
        """What ties a checkpoint to this run: its options, tokenizer and corpus."""
        return hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()

    def append_metrics(self, **row: Any) -> None:
        """Adds a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; what an interruption left at its end is not among them.

        Raises:
            InputError: a line before the last row is none.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        rows, problem = [], None
        for number, line in enumerate(lines, 1):
            row = _read_row(line)
            if row is None:
                problem = problem or f"{path} is damaged: line {number} has no step and tokens."
                continue
            if problem is not None:  # and rows after it: no interruption left that
                raise InputError(f"{problem} Delete the line, or the file: the run goes on without.")
            rows.append(row)
        return rows

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after update number `step`, which a resumed run writes again; returns the others."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_whole(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def _read_row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics, or None for what is none."""
    try:
        row = json.loads(line.decode("utf-8")) if line.endswith(b"\n") else None
    except ValueError:
        return None
    is_row = isinstance(row, dict) and all(type(row.get(name)) is int for name in ("step", "tokens"))
    return row if is_row else None


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _unknown(fields: Mapping[str, Any], kind: Any) -> list[str]:
    return sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)})


def _of_another_version(path: Path, version: str | None, why: str) -> str:
    wrote = "another version of attnax" if version in (None, __version__) else f"attnax {version}"
    return f"{path} was written by {wrote}, and this is {__version__}: {why}. Use that version."


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
