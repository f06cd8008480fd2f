"""`attnax tokenize`: from text to a store of tokens."""

from __future__ import annotations

import signal

from attnax.cli import terminal
from attnax.cli.options import Tokenize
from attnax.cli.progress import counting
from attnax.training.corpus import PARTS, Corpus, read_corpus
from attnax.training.run_data import learn_tokenizer
from attnax.training.store_writer import make_store

__all__ = ["describe", "tokenize"]


def tokenize(options: Tokenize) -> int:
    """Runs the command; returns 0, or 130 after Ctrl-C."""
    try:
        with counting("reading", None) as count:
            corpus = read_corpus(options.source, held_out=options.held_out, kind=options.kind, on_progress=count)
        describe(corpus)
        tokenizer = learn_tokenizer(options.tokenizer, corpus, options.vocab_size, counting)
        with counting("tokens", corpus.num_bytes) as count:
            store = make_store(corpus, tokenizer, options.out, shard_tokens=options.shard_tokens, on_progress=count)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last finished shard")
        return 128 + signal.SIGINT
    tokens = {part: store.num_tokens(part) for part in PARTS}
    print(f"tokenizer  {tokenizer.vocab_size:,} ids, {corpus.train.num_bytes / tokens['train']:.2f} bytes a token")
    print(f"store      {tokens['train']:,} tokens to learn from; {tokens['held_out']:,} held out")
    if store.classes:
        print(f"classes    {', '.join(terminal.printable(str(label)) for label in store.classes)}")
    print(f"           {options.out}")
    return 0


def describe(corpus: Corpus) -> None:
    """Prints how much text there is."""
    parts = (f"{len(part):,} documents, {part.num_bytes / 1e6:,.3g} MB" for part in (corpus.train, corpus.held_out))
    print("corpus     {} to learn from; {} held out".format(*parts))
    if corpus.skipped:
        print(f"           {corpus.skipped:,} binary files skipped")
