"""The tokens of a run: batches to learn from, and held-out text to score."""

from __future__ import annotations

import dataclasses

from attnax.cli.progress import counting
from attnax.training import Batches, RunFolder, RunOptions, TokenStream
from attnax.training.run_data import RunData
from attnax.training.store import StoredTexts

__all__ = ["RunTokens", "read_tokens"]

_PROBE = 32  # windows of held-out text that an evaluation during training scores


@dataclasses.dataclass(frozen=True)
class RunTokens:
    """The tokens of a run.

    Attributes:
        batches: by the number of the update.
        held_out: all of the held-out text.
        held_out_texts: its documents.
        held_out_bytes: number of its bytes.
        probe: the beginning of the held-out text.
        probe_bytes: number of its bytes.
    """

    batches: Batches
    held_out: TokenStream
    held_out_texts: StoredTexts
    held_out_bytes: int
    probe: TokenStream
    probe_bytes: int


def read_tokens(data: RunData, run: RunFolder, options: RunOptions, part: tuple[int, int]) -> RunTokens:
    """Opens the tokens; those of a text that are not yet in the folder of the run are made.

    Args:
        data: what the run learns from.
        run: its folder.
        options: its options.
        part: which part of each batch this process reads, and of how many.

    Raises:
        InputError: the tokens to learn from do not fill one window.
    """
    window, optimizer = options.model.max_len, options.optimizer
    store = data.open(run, counting)
    stream = TokenStream(store.tokens("train"), window)
    stream.require_a_window()
    held_out = TokenStream(store.tokens("held_out"), window)
    probe = TokenStream(held_out.tokens[: _PROBE * window + 1], window)
    bytes_per_token = store.num_bytes() / store.num_tokens()
    print(f"tokenizer  {data.tokenizer.vocab_size:,} ids, {bytes_per_token:.2f} bytes a token")
    return RunTokens(
        batches=Batches(
            stream, batch_size=optimizer.batch_size, accumulate=optimizer.accumulate, seed=options.seed, part=part
        ),
        held_out=held_out,
        held_out_texts=store.texts(part="held_out"),
        held_out_bytes=store.num_bytes("held_out"),
        probe=probe,
        probe_bytes=len(data.tokenizer.decode(probe.tokens[:])),
    )
