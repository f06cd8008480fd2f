"""A run on disk: what was trained on what, how it went, and the checkpoints.

config.json     the options, and the SHA-256 of the corpus and of the tokenizer
tokenizer.json  in the format of the `tokenizers` library
metrics.jsonl   a line for each update and each look at held-out text
checkpoints/    through Orbax
loss.png, sample.txt, result.json   when it is done
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from attnax.config import TransformerConfig
from attnax.text.tokenizer import Tokenizer
from attnax.training.corpus import Corpus
from attnax.training.optimizer import OptimizerConfig
from attnax.typing import InputError

FORMAT = "attnax run 1"

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
        seed: of parameters, data order and dropout.
        model: the model; its vocab_size is the tokenizer's.
        optimizer: the training.
    """

    data: str | None = None
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    pack: bool = False
    held_out: float = 0.02
    checkpoint_every: int = 500
    seed: int = 0
    model: TransformerConfig = DEFAULT_MODEL
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if not 0.0 < self.held_out < 1.0:
            raise InputError(f"--held-out must be above 0 and below 1; got {self.held_out}.")
        if self.checkpoint_every < 1:
            raise InputError(f"--checkpoint-every must be at least 1; got {self.checkpoint_every}.")
        if self.model.max_len < 2:
            raise InputError(f"--max-len must be at least 2, to read a token and write one; got {self.model.max_len}.")
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that JAX does not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be at least 0 and below 2 ** 32; got {seed}.")


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
    def create(cls, out: Path | None) -> RunFolder:
        """Makes `out`, or the next free runs/NNN.

        Raises:
            InputError: `out` exists already, or cannot be made.
        """
        try:
            if out is not None:
                out.mkdir(parents=True)
                return cls(out)
            Path("runs").mkdir(exist_ok=True)
            number = 0
            while (path := Path("runs") / f"{number:03d}").exists():
                number += 1
            path.mkdir()
            return cls(path)
        except FileExistsError as error:
            raise InputError(
                f"{error.filename} exists already; nothing was overwritten. Name another --out."
            ) from error
        except OSError as error:
            raise InputError(f"cannot make the run folder {error.filename}: {error.strerror}.") from error

    def save(self, options: RunOptions, corpus: Corpus, tokenizer: Tokenizer) -> None:
        """Writes tokenizer.json and config.json; the latter is what makes the folder a run."""
        content = tokenizer.to_json().encode()
        (self.path / "tokenizer.json").write_bytes(content)
        fields = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "resume")}
        config = {
            "format": FORMAT,
            "corpus_sha256": corpus.fingerprint,
            "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
            "options": fields,
        }
        config["sha256"] = _digest(config)
        (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def load(self) -> tuple[RunOptions, Tokenizer, str]:
        """Reads what `save` wrote: the options, the tokenizer, and the SHA-256 of the corpus.

        Raises:
            InputError: the folder is not a run, or a file is missing or changed.
        """
        config_path, tokenizer_path = self.path / "config.json", self.path / "tokenizer.json"
        if not self.path.is_dir():
            raise InputError(f"no such run folder: {self.path}.")
        if not config_path.is_file():
            raise InputError(f"{self.path} is not a run folder: it has no config.json.")
        try:
            config = json.loads(config_path.read_text("utf-8"))
            if not isinstance(config, dict) or config.get("format") != FORMAT:
                raise InputError(f"{config_path} was not written by this version of attnax train.")
            if config.pop("sha256", None) != _digest(config):
                raise InputError(f"{config_path} was changed after it was written.")
            fields = config["options"]
            fields["model"] = TransformerConfig(**fields["model"])
            fields["optimizer"] = OptimizerConfig(**fields["optimizer"])
            options = RunOptions(**fields)
            options.check()
            corpus_digest, tokenizer_digest = config["corpus_sha256"], config["tokenizer_sha256"]
        except InputError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{config_path} is damaged: {error}") from error
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
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that an interruption cut short is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}") from error

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after update number `step`, which a resumed run writes again; returns the others."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        (self.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return rows


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
