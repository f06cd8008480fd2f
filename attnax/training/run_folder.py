"""The folder of a run: its options, its metrics and its checkpoints.

.lock           held by the process that trains; .lock.owner names the process
started         the Unix time at which the run was made
config.json     the options and the version of attnax, the SHA-256 of the corpus and of the tokenizer, and the names of
                parts that the config of the model cannot hold
tokenizer.json  in the format of the `tokenizers` library
data/           the store of the tokens, if the run was given text
metrics.jsonl   a line for each update and each evaluation on held-out text
checkpoints/    of Orbax
loss.png, sample.txt, result.json   of a finished run; result.json is written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.nn._parts import part_names, without_modules
from attnax.text.published_tokenizer import TextTokenizer, open_tokenizer
from attnax.text.tokenizer import SpecialTokens
from attnax.training.durable import naming, write_durable
from attnax.training.optimizer import OptimizerConfig
from attnax.training.run_format import FORMAT, is_format, is_run_folder
from attnax.training.run_options import RunOptions
from attnax.version import __version__

__all__ = ["LockedError", "RunFolder"]

LOCK, LOCK_OWNER = ".lock", ".lock.owner"
_BEFORE_CONFIG = {LOCK, LOCK_OWNER, "tokenizer.json", "started", "config.json.tmp"}


@runtime_checkable
class Source(Protocol):
    """What a run learns from: a `Corpus`, a `Store`, or the `RunData` of either."""

    @property
    def fingerprint(self) -> str: ...


class LockedError(InputError):
    """Another process trains in the folder."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run folder: its paths, and its small files, which are read and written here."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def data(self) -> Path:
        """Folder of the store of a run that was given text."""
        return self.path / "data"

    @property
    def result(self) -> Path:
        """The figures of a finished run."""
        return self.path / "result.json"

    @classmethod
    def create(
        cls,
        out: Path | None,
        options: RunOptions,
        corpus: Source,
        tokenizer: TextTokenizer,
        parts: Mapping[str, Any],
    ) -> RunFolder:
        """Makes `out`, or the next free runs/NNN, with the files that `load` reads.

        config.json is written last and makes the folder a run. A folder is also free if it is empty, or if its process
        was killed before config.json was written. `parts` are those of the model, such as {"make_block": MyBlock}; the
        folder keeps their names, and {} is a model of its config alone.

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
                        if run._is_free():  # checked again: no other process can take it now
                            run._save(options, corpus, tokenizer, part_names(**parts))
                            return run
            except (FileExistsError, LockedError):
                continue
            except OSError as error:
                raise InputError(f"cannot make the run folder {error.filename or path}: {error.strerror}.") from error
        assert out is not None
        raise cls(out)._taken()

    def require_free(self) -> None:
        """Raises InputError if the path exists and is no free folder; the message names the next step."""
        if not self.path.is_dir() or not self._is_free():
            raise self._taken()

    def _taken(self) -> InputError:
        is_run = is_run_folder(self.path)
        if not is_run or self.result.exists():
            what = " and is a finished run" if is_run else ""
            return InputError(f"{self.path} exists already{what}; nothing was overwritten. Name another --out.")
        return InputError(
            f"{self.path} exists already and is a run that is not finished; nothing was overwritten. Go on with it by "
            f"--resume {self.path} in place of --out and the run's own flags, or name another --out."
        )

    def _is_free(self) -> bool:
        names = {found.name for found in self.path.iterdir()}
        return not names or (LOCK in names and names <= _BEFORE_CONFIG)

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Keeps other processes from training in the folder; the lock ends with the process.

        Raises:
            LockedError: another process has the lock; the message names the process.
        """
        import filelock  # an optional dependency, which reading a run does not need

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

    def _save(self, options: RunOptions, corpus: Source, tokenizer: TextTokenizer, parts: dict[str, str]) -> None:
        content = tokenizer.to_json().encode()
        (self.path / "tokenizer.json").write_bytes(content)
        (self.path / "started").write_text(f"{time.time():.3f}\n", "utf-8")
        given = dataclasses.asdict(options)  # the options may be of a subclass with more fields
        config = {
            "format": FORMAT,
            "attnax": __version__,
            "corpus_sha256": corpus.fingerprint,
            "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
            "special_tokens": dataclasses.asdict(tokenizer.special),
            "options": {field.name: given[field.name] for field in dataclasses.fields(RunOptions)},
            **({"parts": parts} if parts else {}),
        }
        config["sha256"] = _digest(config)
        write_durable(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def load(self) -> tuple[RunOptions, TextTokenizer, str]:
        """Reads the files that `create` wrote: the options, the tokenizer, and the SHA-256 of the corpus or store.

        Raises:
            InputError: the folder is not a run or is of another version, or a file is missing or changed.
        """
        options, corpus_digest, tokenizer_digest = self._load_config()
        path = self.path / "tokenizer.json"
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        if found != tokenizer_digest:
            raise InputError(f"{path} is {'missing' if found is None else 'not the one of this run'}.")
        special = json.loads(self._config).get("special_tokens")
        return options, open_tokenizer(path, special and SpecialTokens(**special)), corpus_digest

    @property
    def started(self) -> float | None:
        """The Unix time at which the run was made, or None if its file is missing or damaged."""
        try:
            return float((self.path / "started").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def parts(self) -> dict[str, str]:
        """The names of the parts that the model was made with and its config cannot hold; `load` checks the file."""
        return dict(json.loads(self._config).get("parts", {}))

    def require_parts(self, given: Mapping[str, Any]) -> None:
        """Raises InputError unless the parts are those of the run, by their names without the module.

        The module is left out, since a part of a script is in `__main__` where the script runs.
        """
        names, wanted = part_names(**given), self.parts
        for part in dict.fromkeys((*wanted, *names)):
            have, want = names.get(part), wanted.get(part)
            if want is None:
                raise InputError(f"the model of {self.path} was made without {part}; got {part}={have}. Leave it out.")
            if have is None:
                raise InputError(
                    f"the model of {self.path} was made with {part}={want}, which is code and not in the folder. Open "
                    f"it in Python: attnax.training.open_run(path, {part}={without_modules(want)})."
                )
            if without_modules(have) != without_modules(want):
                raise InputError(f"the model of {self.path} was made with {part}={want}; got {part}={have}.")

    def _load_config(self) -> tuple[RunOptions, str, str]:
        """The options, and the SHA-256 of the corpus and of the tokenizer."""
        path = self.path / "config.json"
        if not self.path.is_dir():
            raise InputError(f"no such run folder: {self.path}.")
        if not path.is_file():
            if self._is_free():
                raise InputError(
                    f"{self.path} holds no run yet: its process was stopped before it began. Start it again as before."
                )
            raise InputError(f"{self.path} is not a run folder: it has no config.json.")
        try:
            config = json.loads(self._config.decode("utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}.") from error
        if not isinstance(config, dict) or not is_format(config.get("format")):
            raise InputError(f"{path} was not written by attnax train.")
        if config.get("format") != FORMAT:
            raise InputError(_of_another_version(path, config, f"its format is {config['format']!r}"))
        if config.pop("sha256", None) != _digest(config):
            raise InputError(f"{path} was changed after it was written.")
        try:
            fields, unknown = dict(config["options"]), _unknown(config["options"], RunOptions)
            for name, kind in (("model", TransformerConfig), ("optimizer", OptimizerConfig)):
                unknown += _unknown(fields[name], kind)
            if unknown:
                more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
                raise ValueError(f"it has options {', '.join(unknown[:3])}{more}")
            model, optimizer = TransformerConfig(**fields.pop("model")), OptimizerConfig(**fields.pop("optimizer"))
            options = RunOptions(**fields, model=model, optimizer=optimizer)
            options.check()
            return options, config["corpus_sha256"], config["tokenizer_sha256"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(_of_another_version(path, config, str(error))) from error

    @functools.cached_property
    def _config(self) -> bytes:
        return (self.path / "config.json").read_bytes()

    @property
    def owner(self) -> str:
        """The name of the run in its checkpoints, which depends on options, tokenizer and corpus."""
        return hashlib.sha256(self._config).hexdigest()

    def append_metrics(self, **row: Any) -> None:
        """Adds a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without an incomplete line that an interruption left at the end.

        Raises:
            InputError: a line that is not a row comes before a row.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        rows, problem = [], None
        for number, line in enumerate(lines, 1):
            row = _read_row(line)
            if row is None:
                problem = problem or f"{path} is damaged: line {number} has no step and tokens."
                continue
            if problem is not None:  # an interruption leaves no rows after the line
                raise InputError(f"{problem} Delete the line, or the file; the run goes on without it.")
            rows.append(row)
        return rows

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Deletes the rows after update number `step`, which a resumed run writes again; returns the remaining rows."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_durable(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def _read_row(line: bytes) -> dict[str, Any] | None:
    """The row of metrics in a line, or None if the line is not a row."""
    try:
        row = json.loads(line.decode("utf-8")) if line.endswith(b"\n") else None
    except ValueError:
        return None
    is_row = isinstance(row, dict) and all(type(row.get(name)) is int for name in ("step", "tokens"))
    return row if is_row else None


def _unknown(fields: Mapping[str, Any], kind: Any) -> list[str]:
    return sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)})


def _of_another_version(path: Path, config: Mapping[str, Any], why: str) -> str:
    version = config.get("attnax")
    wrote = "another version of attnax" if version in (None, __version__) else f"attnax {version}"
    return f"{path} was written by {wrote}, and this is {__version__}: {why}. Use that version."


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
