"""The options of a training run, with their limits and defaults."""

from __future__ import annotations

import dataclasses
import math

from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.training.corpus import HELD_OUT
from attnax.training.layer_losses import LOSS_WEIGHTS
from attnax.training.optimizer import OptimizerConfig

__all__ = ["RunOptions", "check_seed", "check_vocab_size"]

# These defaults reach few held-out bits per byte after four minutes of training on 2 CPU cores without AVX-512. The
# model was compared with other widths, depths, contexts, vocabularies, batches and rates, and Muon with AdamW.
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
DEFAULT_OPTIMIZER = OptimizerConfig(
    algorithm="muon", steps=1300, batch_size=8, learning_rate=4e-3, final_learning_rate=0.02
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The text, the model and the training of a run; saved in its folder.

    Attributes:
        data: a file, a folder, or a glob in quotes; or a store of `attnax tokenize`. By default the source of Python's
            standard library.
        tokenizer: "bpe" learns byte pairs from the training files, "bytes" has one token a byte; or the folder of a run
            or a checkpoint, or a tokenizer.json. A store has its own.
        pack: files in one row do not attend each other, and the positions of each file start at 0.
        held_out: fraction of the files to hold out.
        checkpoint_every: number of updates between checkpoints.
        keep_every: keep the checkpoint of each multiple of this number too, beside the two newest and the best.
        eval_every: number of updates between evaluations on held-out text. By default checkpoint_every. The best
            checkpoint is the best of those that are saved after an evaluation.
        ema: decay of an exponential average of the parameters, such as 0.999. By default there is none.
        max_skipped: number of updates that may be skipped because of a non-finite loss or gradient; one more stops the
            run. By default 0, with --resume the run's own number.
        load_balance_loss: weight of the mixtures' load-balance losses, summed over the layers, in the loss.
        router_z_loss: weight of the mixtures' router z-losses, summed over the layers, in the loss.
        seed: of parameters, data order and dropout.
        model: config of the model; its vocab_size is the tokenizer's.
        optimizer: config of the training.
    """

    data: str | None = None
    tokenizer: str = "bpe"
    pack: bool = False
    held_out: float = HELD_OUT
    checkpoint_every: int = 500
    keep_every: int | None = None
    eval_every: int | None = None
    ema: float | None = None
    max_skipped: int | None = None
    load_balance_loss: float = LOSS_WEIGHTS["load_balance_loss"]
    router_z_loss: float = LOSS_WEIGHTS["router_z_loss"]
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
        for name in ("eval_every", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"--ema must be above 0 and below 1; got {self.ema}.")
        if self.max_skipped is not None and self.max_skipped < 0:
            raise InputError(f"--max-skipped must be at least 0; got {self.max_skipped}.")
        for name in ("load_balance_loss", "router_z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} must be at least 0 and finite; got {getattr(self, name)}.")
        if self.data is not None and not self.data:
            raise InputError("--data must not be empty. Leave it out for the source of Python's standard library.")
        if self.model.max_len < 2:
            raise InputError(f"--max-len must be at least 2, to read a token and write one; got {self.model.max_len}.")
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that JAX does not accept."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be at least 0 and below 2 ** 32; got {seed}.")


def check_vocab_size(tokenizer: str, vocab_size: int) -> None:
    """Raises InputError for a number of tokens beside a tokenizer that has its own."""
    if tokenizer != "bpe" and vocab_size != DEFAULT_MODEL.vocab_size:
        raise InputError(f"--vocab-size is for --tokenizer bpe; got --tokenizer {tokenizer}. Leave it out.")
