"""The flags of the commands, as dataclasses; what stands here is also what `--help` says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import tyro

from attnax.config import TransformerConfig
from attnax.training.optimizer import OptimizerConfig
from attnax.typing import InputError

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
        _check_seed(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(RunOptions):
    """Train a language model on text, measure it on held-out files, and let it write.

    Attributes:
        out: run folder to make. By default the next free runs/NNN.
        resume: run folder to go on with after an interruption; its own options apply, and no others can be given.
    """

    out: Path | None = None
    resume: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a trained model, streaming the text.

    Attributes:
        run: run folder that `attnax train` made.
        prompt: text to continue. By default the model starts a document of its own.
        max_new_tokens: tokens to write at most. By default what fits into the model's context.
        temperature: 0 always takes the likeliest token, 1 samples the model's own distribution.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the likeliest tokens that reach this probability together.
        seed: of the sampling.
    """

    run: tyro.conf.Positional[Path]
    prompt: str = ""
    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be at least 1; got {self.max_new_tokens}.")
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(f"--temperature must be at least 0 and finite; got {self.temperature}.")
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            raise InputError(f"--top-k must be at least 1 and below 2 ** 31; got {self.top_k}.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"--top-p must be above 0 and at most 1; got {self.top_p}.")
        _check_seed(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Time attention beside jax.nn and PyTorch on this machine; needs a clone of the repository.

    Attributes:
        cases: which masks and biases; by default all.
        lengths: which sequence lengths; by default 512, 2048 and 4096.
        rounds: times that each side is measured, in turns.
        json: also write the figures here.
        markdown: also write the table here.
    """

    cases: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    rounds: int = 5
    json: Path | None = None
    markdown: Path | None = None

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if self.rounds < 1:
            raise InputError(f"--rounds must be at least 1; got {self.rounds}.")
        if any(length < 1 for length in self.lengths):
            raise InputError(f"--lengths must be at least 1; got {' '.join(map(str, self.lengths))}.")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be at least 0 and below 2 ** 32; got {seed}.")
