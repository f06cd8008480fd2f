"""`attnax generate`: text from a trained model."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cli.options import Generate
from attnax.cli.run_folder import RunFolder
from attnax.generation import Sampler
from attnax.models import TransformerLM
from attnax.training import Tokenizer, latest_checkpoint, restore_checkpoint
from attnax.training.tokenizer import DOCUMENT
from attnax.typing import InputError


def generate(options: Generate) -> int:
    """Runs the command; the text goes to standard output as it is drawn."""
    model, tokenizer = load_model(options.run)
    sampler = Sampler(options.temperature, options.top_k, options.top_p)
    pieces = write_text(model, tokenizer, options.prompt, options.max_new_tokens, sampler, options.seed)
    sys.stdout.write(options.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def load_model(run: Path) -> tuple[TransformerLM, Tokenizer]:
    """The model of a run at its newest checkpoint, and its tokenizer.

    Raises:
        InputError: not a run, no checkpoint, or a damaged one.
    """
    folder = RunFolder(run)
    options, tokenizer, _ = folder.load()
    step = latest_checkpoint(folder.checkpoints)
    if step is None:
        raise InputError(f"{run} has no checkpoint yet.")
    model = TransformerLM(nnx.Rngs(0), options.model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(model, restore_checkpoint(folder.checkpoints, step, "params", params, owner=folder.owner))
    return model, tokenizer


def write_text(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int | None,
    sampler: Sampler,
    seed: int,
) -> Iterator[str]:
    """Checks that everything fits, then continues `prompt` in pieces of whole characters until its document ends.

    Raises:
        InputError: the prompt, or the prompt and the new tokens, are longer than the model's context.
    """
    ids = np.concatenate([[DOCUMENT], tokenizer.encode(prompt.encode("utf-8", "surrogateescape"))]).astype(np.int32)
    room = model.config.max_len - len(ids)
    if room < 1:
        raise InputError(
            f"the prompt is too long: it has {len(ids)} tokens, and the model's context of {model.config.max_len} "
            "must also hold what comes after it."
        )
    if max_new_tokens is not None and max_new_tokens > room:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} is too many: after the prompt's {len(ids)} tokens the model's context "
            f"of {model.config.max_len} has room for {room}."
        )
    tokens = model.stream(
        jnp.asarray(ids)[None],
        max_new_tokens=max_new_tokens or room,
        sampler=sampler,
        key=jax.random.key(seed),
        end_token=DOCUMENT,
    )
    # A character's bytes may be spread over several tokens.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pieces() -> Iterator[str]:
        for token in tokens:
            yield decoder.decode(tokenizer.decode(token))
        yield decoder.decode(b"", final=True)

    return pieces()
