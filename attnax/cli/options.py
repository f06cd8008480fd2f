"""The flags of the commands, as dataclasses; `--help` shows their docstrings.

Limits and defaults come from the classes that use the values: `RunOptions` and its configs, `Sampler`, the caches.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from attnax.cache import SPARE_SLOTS, CacheKind
from attnax.cli.trace import read_updates
from attnax.errors import InputError
from attnax.generation.candidates import CUTS
from attnax.generation.samplers import Sampler
from attnax.sharding import Layout
from attnax.training.corpus import HELD_OUT
from attnax.training.run_options import DEFAULT_MODEL, RunOptions, check_seed, check_vocab_size
from attnax.training.text_files import Kind

if TYPE_CHECKING:
    from attnax.pretrained.generation_settings import GenerationSettings

__all__ = ["DRAW", "Bench", "Generate", "Inspect", "Tokenize", "Train", "read_layout", "refused_layout"]

DRAW: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}  # unless a flag or a file chooses


OF_A_PROCESS = ("step", "layout", "dry_run", "profile", "tensorboard", "peak_flops", "compile_cache")  # not of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(RunOptions):
    """Train a language model on text, measure it on held-out files, and let it write.

    Attributes:
        out: run folder to make. By default the next free runs/NNN.
        resume: run folder to go on with after an interruption. Its own options apply; only flags that are no part of a
            run can be given too: --step, --layout, --max-skipped, and the flags from --dry-run on.
        step: with --resume, the checkpoint to go on from. By default the newest. Later ones are deleted after the first
            update.
        layout: the devices to train on, such as fsdp=4,tensor=2 or data; axes are data, fsdp, tensor, context and
            expert. It is no part of the run: --resume may give another one. By default one device.
        dry_run: print the parameters, the memory of a device, the layout, and the tokens and operations of the run.
            Nothing is allocated or written, of a text the beginning is read, and the devices of --layout need not be
            there.
        profile: FROM:TO, the first and the last update of a trace by JAX's profiler, in the folder profile of the run.
        tensorboard: write the metrics as files for TensorBoard too, into the folder tensorboard of the run.
        peak_flops: of a device, operations a second, for the share of the peak (mfu) in the metrics. By default known
            for many TPUs and GPUs.
        compile_cache: keep compiled programs in the user's cache folder, for the next time.
    """

    out: Path | None = None
    resume: Path | None = None
    step: int | None = None
    layout: str | None = None
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    profile: str | None = None
    tensorboard: tyro.conf.FlagCreatePairsOff[bool] = False
    peak_flops: float | None = None
    compile_cache: bool = True

    def check(self) -> None:
        """Raises InputError for a value out of range, or with --resume for flags that are fixed in the run."""
        super().check()
        read_layout(self.layout)
        read_updates(self.profile)
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise InputError(f"--peak-flops must be above 0 and finite; got {self.peak_flops}.")
        if self.out is not None and self.out == Path():
            raise InputError("--out must not be empty. Leave it out for the next free runs/NNN.")
        if self.resume is None:
            if self.step is not None:
                raise InputError("--step needs --resume.")
            return
        allowed = dict.fromkeys(("resume", "max_skipped", *OF_A_PROCESS))
        if dataclasses.replace(self, **{name: getattr(Train, name) for name in allowed}) != Train():
            raise InputError("--resume goes on with the run's own options; leave the other flags out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Turn text into a store of tokens, which `attnax train --data STORE` reads without its tokenizer.

    A command that was stopped goes on when it is repeated; what it makes does not depend on the stop.

    Attributes:
        source: a file, a folder, or a glob in quotes. Each row of a .jsonl or .parquet file is a document: with text,
            with text and label, or with source and target. By default the source of Python's standard library.
        out: folder to make.
        tokenizer: "bpe" learns byte pairs from the documents, "bytes" has one token a byte; or the folder of a run, a
            store or a checkpoint, or a tokenizer.json.
        vocab_size: with bpe, number of tokens.
        held_out: fraction of the documents to hold out.
        kind: what rows are for; by default the fields of the first row say so.
        shard_tokens: tokens of a shard, after which an interrupted command goes on.
    """

    source: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="SOURCE")] = None
    out: Path
    tokenizer: str = "bpe"
    vocab_size: int = DEFAULT_MODEL.vocab_size
    held_out: float = HELD_OUT
    kind: Kind | None = None
    shard_tokens: int = 1 << 26

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if self.source is not None and not self.source:
            raise InputError("SOURCE must not be empty. Leave it out for the source of Python's standard library.")
        if self.out == Path():
            raise InputError("--out must not be empty. Name a folder to make.")
        if not self.tokenizer:
            raise InputError("--tokenizer must not be empty: bpe, bytes, or a path.")
        if not 0.0 < self.held_out < 1.0:
            raise InputError(f"--held-out must be above 0 and below 1; got {self.held_out}.")
        if self.shard_tokens < 1:
            raise InputError(f"--shard-tokens must be at least 1; got {self.shard_tokens}.")
        check_vocab_size(self.tokenizer, self.vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a trained model. The text is printed unchanged, escape codes included.

    Defaults come from the generation_config.json of a published checkpoint. Each of --temperature, --top-k, --top-p,
    --min-p, --seed and --num-samples makes the command draw, even if that file asks for no draw.

    Attributes:
        folder: run folder that `attnax train` made, or a published checkpoint: a folder of config.json, *.safetensors
            and tokenizer.json, or the name of a model on the Hugging Face hub, such as Qwen/Qwen3-0.6B.
        prompt: text to continue, or for an encoder-decoder to read. By default the model starts a new text.
        max_new_tokens: greatest number of new tokens. By default the rest of the model's context, but at most 4096.
        temperature: 0 always takes the likeliest token, 1 samples the model's own distribution. By default 0.8 if no
            file decides how to draw.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the likeliest tokens whose probabilities reach this number together. By default 0.95 if no
            file decides how to draw.
        min_p: sample from the tokens whose probability is at least this fraction of the likeliest token's.
        repetition_penalty: above 1, tokens that occur in the text, prompt included, become less likely.
        presence_penalty: subtracted from the logits of tokens that were written.
        frequency_penalty: subtracted once for each time that a token was written.
        no_repeat_ngram: no sequence of this many tokens occurs twice in the text, prompt included.
        stop: a string that ends the text and is not printed; give the flag once for each.
        seed: of the sampling. By default 0.
        num_samples: number of texts, printed one after another; with --beams, of the best texts. By default 1.
        beams: search for the likeliest text, with this many unfinished texts at a time, instead of sampling.
        length_penalty: with --beams, the score of a text is its log-probability / length ** this. By default 1.
        draft: folder or name of a small model with the same tokenizer. It drafts several tokens, which the large model
            checks at once.
        draft_tokens: number of tokens drafted each time.
        cache: layout of keys and values. By default contiguous, with --draft ring.
        cache_dtype: of keys and values. By default the model's; int8 stores 8-bit integers, each vector with a scale.
        dtype: of parameters and computation. By default the dtype of the files.
        log_probs: print the text's log-probability and bits per byte to standard error at the end. Every drawn token
            counts, the tokens of the end and of a stop string included.
        stream: print the text as it is drawn. This is the default, except with --beams, --draft or more than one
            sample.
        no_stream: print the text when it is complete.
        step: of a run, the checkpoint to use. By default the newest.
        weights: of a run, params or ema, the exponential average of a run with --ema. By default params.
        revision: of a model on the hub: a branch, a tag or a commit.
        ignore: an unknown key of config.json to ignore; give the flag once for each.
        compile_cache: keep compiled programs in the user's cache folder, for the next time.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    prompt: str = ""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram: int | None = None
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    seed: int | None = None
    num_samples: int | None = None
    beams: int | None = None
    length_penalty: float | None = None
    draft: str | None = None
    draft_tokens: int = 4
    cache: CacheKind | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    log_probs: tyro.conf.FlagCreatePairsOff[bool] = False
    stream: tyro.conf.FlagCreatePairsOff[bool] = False
    no_stream: tyro.conf.FlagCreatePairsOff[bool] = False
    step: int | None = None
    weights: Literal["params", "ema"] | None = None
    revision: str | None = None
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    compile_cache: bool = True

    def check(self) -> None:
        """Raises InputError for a value out of range, or options that exclude each other."""
        self.sampler()
        for name in ("max_new_tokens", "num_samples", "beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{_flag(name)} must be at least 1; got {value}.")
        if self.length_penalty is not None and not abs(self.length_penalty) <= np.finfo(np.float32).max:
            raise InputError(f"--length-penalty must be finite; got {self.length_penalty}.")
        if not 1 <= self.draft_tokens <= SPARE_SLOTS:
            raise InputError(f"--draft-tokens must be at least 1 and at most {SPARE_SLOTS}; got {self.draft_tokens}.")
        if "" in self.stop:
            raise InputError("--stop must not be empty; it would end every text before its first token.")
        for stop in self.stop:
            if not stop.isascii() and any("\ud800" <= letter <= "\udfff" for letter in stop):
                raise InputError(f"--stop must be text in UTF-8; got {stop!r}.")
        if self.seed is not None:
            check_seed(self.seed)
        self._check_together()

    def sampler(self, **others: Any) -> Sampler:
        """The `Sampler` with the values of the flags; with --beams, without the flags of a draw.

        Raises:
            InputError: a value out of range.
        """
        known = {field.name for field in dataclasses.fields(Sampler)} & vars(self).keys()
        names = known if self.beams is None else known.difference(_OF_A_DRAW)
        try:
            return Sampler(**{name: getattr(self, name) for name in names}, **others)
        except ValueError as error:
            raise InputError(_about_a_flag(error)) from error

    def settle(self, settings: GenerationSettings) -> Generate:
        """The options with defaults: the settings of the checkpoint, or, if it has none, the command's own.

        --draft, --stream and a flag of a draw override a beam search of the settings. A flag of a draw overrides greedy
        settings.
        """
        asks = any(getattr(self, name) is not None for name in _OF_A_DRAW) or (self.num_samples or 1) > 1
        beams = self.beams
        if beams is None and settings.num_beams > 1 and not (asks or self.draft is not None or self.stream):
            beams = settings.num_beams
        draw = DRAW
        if settings.says_how:
            draw = dataclasses.replace(settings, do_sample=settings.do_sample or asks).drawing()
        others = settings.penalties() | {"beams": beams, "length_penalty": settings.length_penalty, "seed": 0}
        defaults = {key: value for key, value in (draw | others).items() if getattr(self, key) is None}
        settled = dataclasses.replace(self, stop=self.stop or settings.stop_strings, **defaults)
        if self.length_penalty is not None and beams is None:
            raise InputError("--length-penalty needs --beams.")
        samples = 1
        if beams is not None:
            samples = min(settings.num_return_sequences, beams)
        elif settled.temperature and not self.stream:
            samples = settings.num_return_sequences
        return settled if self.num_samples is not None else dataclasses.replace(settled, num_samples=samples)

    def _check_together(self) -> None:
        """Raises InputError for flags that exclude each other, and for flags that need another flag."""
        changed = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        if self.temperature == 0.0:
            changed.discard("temperature")
        if self.num_samples == 1:
            changed.discard("num_samples")
        excluded = [
            ("stream", "no_stream", "give one of them"),
            ("beams", "draft", "a beam search has no draft"),
            *(("beams", name, "nothing is drawn in a beam search") for name in _OF_A_DRAW),
            *(("stream", name, "its text is printed when it is whole") for name in ("beams", "draft", "num_samples")),
        ]
        for one, other, why in excluded:
            if {one, other} <= changed:
                raise InputError(f"{_flag(one)} and {_flag(other)} exclude each other: {why}.")
        if self.draft is not None and self.cache == "contiguous":
            raise InputError(
                "--draft and --cache contiguous exclude each other: tokens are taken back; use ring or paged."
            )
        if "draft_tokens" in changed and self.draft is None:
            raise InputError("--draft-tokens needs --draft.")
        if self.beams is not None and self.num_samples is not None and self.num_samples > self.beams:
            raise InputError(f"--num-samples must be at most --beams {self.beams}; got {self.num_samples}.")


_OF_A_DRAW = ("temperature", *CUTS, "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the model in a folder from the headers of its files: config, parameters, memory, and problems.

    The exit code is 1 if the folder holds a published checkpoint that cannot be loaded. All problems are printed,
    including problems with its tokenizer.json, and everything that is known in spite of them. No tensor is read, so
    that a tied head that differs from the embeddings is noticed on loading only.

    Attributes:
        folder: published checkpoint (a folder of config.json and *.safetensors, or the name of a model on the Hugging
            Face hub), or run folder that `attnax train` made.
        revision: of a model on the hub: a branch, a tag or a commit.
        ignore: an unknown key of config.json to ignore; give the flag once for each.
        layout: of devices, such as fsdp=4,tensor=2: show where each parameter lives, and the bytes that a device holds
            and moves in a training step. Devices are counted only for an axis without a size.
        batch_size: with --layout, number of sequences in a step. By default the run's, or one for each part of the
            batch.
        length: with --layout, tokens of a sequence. By default the model's max_len.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    revision: str | None = None
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    layout: str | None = None
    batch_size: int | None = None
    length: int | None = None

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        read_layout(self.layout)
        for name in ("batch_size", "length"):
            value = getattr(self, name)
            if value is not None and self.layout is None:
                raise InputError(f"{_flag(name)} needs --layout.")
            if value is not None and value < 1:
                raise InputError(f"{_flag(name)} must be at least 1; got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Time attention beside jax.nn and PyTorch on this machine; needs a clone of the repository.

    Attributes:
        cases: names of masks and biases; by default all.
        lengths: of the sequences; by default 512, 2048 and 4096.
        rounds: number of measurements of each side, in turns.
        json: file to write the figures to as well, under the kind of machine (AVX-512 or AVX2).
        markdown: file to write the table to as well, in the section of the kind of machine.
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


def refused_layout(error: ValueError, more: str = "") -> InputError:
    """An error of `Layout` about the flag, with another sentence behind it."""
    return InputError(f"--layout: {str(error).removeprefix('Layout: ')}{more}")


def read_layout(text: str | None) -> Layout | None:
    """The layout of a flag, without the number of devices; raises InputError for a text that names none."""
    try:
        return None if text is None else Layout.parse(text)
    except ValueError as error:
        raise refused_layout(error) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _about_a_flag(error: ValueError) -> str:
    """The message of a class about one of its fields, with the flag in place of the field."""
    message = re.fullmatch(r"\w+: (\w+) (must .*); got \1=(.*)\.", str(error), re.DOTALL)
    return str(error) if message is None else f"{_flag(message[1])} {message[2]}; got {message[3]}."
