"""The flags of the commands, as dataclasses; what stands here is also what `--help` says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from attnax.errors import InputError
from attnax.training.run_folder import RunOptions, check_seed

if TYPE_CHECKING:
    from attnax.pretrained.generation_config import GenerationSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(RunOptions):
    """Train a language model on text, measure it on held-out files, and let it write.

    Attributes:
        out: run folder to make. By default the next free runs/NNN.
        resume: run folder to go on with after an interruption; its own options apply, and of the others only --step,
            --max-skipped and --compile-cache can be given.
        step: with --resume, the checkpoint to go on from. By default the newest.
        compile_cache: keep compiled programs in the user's cache folder, for the next time.
    """

    out: Path | None = None
    resume: Path | None = None
    step: int | None = None
    compile_cache: bool = True

    def check(self) -> None:
        """Raises InputError for a value out of range, or flags that a run that goes on has already."""
        super().check()
        if self.out is not None and self.out == Path():
            raise InputError("--out must not be empty. Leave it out for the next free runs/NNN.")
        if self.resume is None:
            if self.step is not None:
                raise InputError("--step needs --resume.")
            return
        own = dataclasses.replace(
            self, max_skipped=Train.max_skipped, step=None, compile_cache=Train.compile_cache, resume=None
        )
        if own != Train():
            raise InputError("--resume goes on with the run's own options; leave the other flags out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a trained model, streaming the text as it is, codes that a terminal obeys included.

    What is not given is as the generation_config.json of a published checkpoint says. A flag of drawing draws, whatever
    that says: --temperature, --top-k, --top-p, --min-p, --seed or --num-samples.

    Attributes:
        folder: run folder that `attnax train` made, or a published checkpoint: a folder of config.json, *.safetensors
            and tokenizer.json, or the name of a model on the Hugging Face hub, such as Qwen/Qwen3-0.6B.
        prompt: text to continue, or for an encoder-decoder to read. By default the model starts a text of its own.
        max_new_tokens: tokens to write at most. By default what fits into the model's context, but not above 4096.
        temperature: 0 always takes the likeliest token, 1 samples the model's own distribution. By default 0.8 where no
            file says how to draw.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the likeliest tokens that reach this probability together. By default 0.95 where no file says
            how to draw.
        min_p: sample from the tokens that are at least so many times as likely as the likeliest.
        repetition_penalty: above 1, tokens that stand in the text, prompt included, become less likely.
        presence_penalty: subtracted from the logits of tokens that were written.
        frequency_penalty: subtracted once for each time that a token was written.
        no_repeat_ngram: no sequence of so many tokens stands twice in the text, prompt included.
        stop: a string that ends the text and is not printed; give the flag once for each.
        seed: of the sampling. By default 0.
        num_samples: texts to write, printed one after another; with --beams, how many of the best. By default 1.
        beams: search for the likeliest text with so many beginnings at a time instead of sampling.
        length_penalty: with --beams, a text's score is its log-probability / length ** this. By default 1.
        draft: folder or name, of either kind, of a small model with the same tokenizer, which drafts tokens for this
            one to check at once.
        draft_tokens: tokens drafted each time.
        cache: how keys and values are kept. By default contiguous, with --draft ring.
        cache_dtype: of keys and values. By default the model's; int8 keeps 8-bit integers, each vector with a scale.
        dtype: of parameters and computation. By default that of the files.
        log_probs: print the text's log-probability and bits per byte to standard error at the end. Every token that was
            drawn counts, those of the end and of a stop string too.
        stream: print the text as it is drawn, which is the default where it can be done: not with --beams, --draft or
            more than one sample.
        no_stream: print the text when it is whole.
        step: of a run, the checkpoint that writes. By default the newest.
        revision: of a model on the hub: a branch, a tag or a commit.
        ignore: a key of config.json that is not known here, and is passed over; give the flag once for each.
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
    cache: Literal["contiguous", "ring", "paged"] | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    log_probs: tyro.conf.FlagCreatePairsOff[bool] = False
    stream: tyro.conf.FlagCreatePairsOff[bool] = False
    no_stream: tyro.conf.FlagCreatePairsOff[bool] = False
    step: int | None = None
    revision: str | None = None
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    compile_cache: bool = True

    def check(self) -> None:
        """Raises InputError for a value out of range, or options that exclude each other."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be at least 1; got {self.max_new_tokens}.")
        if self.temperature is not None and not 0.0 <= self.temperature <= _LARGEST:
            raise InputError(f"--temperature must be at least 0 and finite; got {self.temperature}.")
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            raise InputError(f"--top-k must be at least 1 and below 2 ** 31; got {self.top_k}.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"--top-p must be above 0 and at most 1; got {self.top_p}.")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"--min-p must be at least 0 and at most 1; got {self.min_p}.")
        if self.repetition_penalty is not None and not 0.0 < self.repetition_penalty <= _LARGEST:
            raise InputError(f"--repetition-penalty must be above 0 and finite; got {self.repetition_penalty}.")
        for name in ("presence_penalty", "frequency_penalty", "length_penalty"):
            value = getattr(self, name)
            if value is not None and not abs(value) <= _LARGEST:
                raise InputError(f"{_flag(name)} must be finite; got {value}.")
        for name in ("no_repeat_ngram", "num_samples", "beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{_flag(name)} must be at least 1; got {value}.")
        if not 1 <= self.draft_tokens <= 16:
            raise InputError(f"--draft-tokens must be at least 1 and at most 16; got {self.draft_tokens}.")
        if "" in self.stop:
            raise InputError("--stop must not be empty; it would end every text before its first token.")
        for stop in self.stop:
            if not stop.isascii() and any("\ud800" <= letter <= "\udfff" for letter in stop):
                raise InputError(f"--stop must be text in UTF-8; got {stop!r}.")
        if self.seed is not None:
            check_seed(self.seed)
        self._check_together()

    def settle(self, said: GenerationSettings) -> Generate:
        """The options, with what a checkpoint says, or else the command's own defaults, where none was given.

        A beam search that it asks for gives way to a flag of drawing, --draft or --stream; so does its greedy text to a
        flag of drawing.
        """
        asks = any(getattr(self, name) is not None for name in _DRAWING) or (self.num_samples or 1) > 1
        beams = self.beams
        if beams is None and said.num_beams > 1 and not (asks or self.draft is not None or self.stream):
            beams = said.num_beams
        drawing = {"temperature": 0.8, "top_p": 0.95}
        if said.says_how:
            drawing = dataclasses.replace(said, do_sample=said.do_sample or asks).drawing()
        others = said.penalties() | {"beams": beams, "length_penalty": said.length_penalty, "seed": 0}
        settled = dataclasses.replace(
            self,
            stop=self.stop or said.stop_strings,
            **{key: value for key, value in (drawing | others).items() if getattr(self, key) is None},
        )
        if self.length_penalty is not None and beams is None:
            raise InputError("--length-penalty needs --beams.")
        samples = 1
        if beams is not None:
            samples = min(said.num_return_sequences, beams)
        elif settled.temperature and not self.stream:
            samples = said.num_return_sequences
        return settled if self.num_samples is not None else dataclasses.replace(settled, num_samples=samples)

    def _check_together(self) -> None:
        changed = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        if self.temperature == 0.0:
            changed.discard("temperature")
        if self.num_samples == 1:
            changed.discard("num_samples")
        excluded = [
            ("stream", "no_stream", "give one of them"),
            ("beams", "draft", "a beam search has no draft"),
            *(("beams", name, "nothing is drawn in a beam search") for name in _DRAWING),
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


_LARGEST = 3.4e38  # what is beyond is infinite in float32
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the model in a folder from the headers of its files: config, parameters, memory, and what is not understood.

    The exit code is 1 if the folder holds a published checkpoint that could not be loaded; all that stands against it
    is printed, its tokenizer.json included, and all that is known nevertheless. No tensor is read, so that a tied head
    that differs from the embeddings is noticed on loading only.

    Attributes:
        folder: published checkpoint (a folder of config.json and *.safetensors, or the name of a model on the Hugging
            Face hub), or run folder that `attnax train` made.
        revision: of a model on the hub: a branch, a tag or a commit.
        ignore: a key of config.json that is not known here, and is passed over; give the flag once for each.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    revision: str | None = None
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()

    def check(self) -> None:
        """Nothing can be out of range."""


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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
