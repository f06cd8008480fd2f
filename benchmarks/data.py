"""Tokens a second of `attnax tokenize` and of batches, and an order beside a permutation of all windows.

    python benchmarks/data.py                    # the standard library of the running interpreter
    python benchmarks/data.py --source notes/ --windows 1000000

The first table has the steps of `attnax tokenize`; the memory is the greatest of the process so far, with JAX and all
imports. The second one has the milliseconds of a batch of 8 windows of 128 tokens, medians of several: by a permutation
of all windows that NumPy draws for the batch, and by Grain, which computes the places of the batch alone. Then it has
the tokens a second of the latter, read in this thread and by 4 threads ahead of it. The tokens of all lines but the
first are made up.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from _machine import measure
from _pages import show

WINDOW, BATCH, ROUNDS = 128, 8, 30


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=None, help="as of attnax tokenize; by default the standard library")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--windows", type=int, nargs="*", default=[1_000_000, 100_000_000])
    options = parser.parse_args(arguments)
    machine = measure()

    import grain

    from attnax.text import make_tokenizer
    from attnax.training import TokenStream, make_store, read_corpus

    print(f"{machine.line}; grain {getattr(grain, '__version__', '')}\n")
    with tempfile.TemporaryDirectory() as folder:
        read, corpus = timed(lambda: read_corpus(options.source))
        size = (corpus.train.num_bytes + corpus.held_out.num_bytes) / 1e6
        sample = corpus.train.sample()
        learn, tokenizer = timed(lambda: make_tokenizer("bpe", sample, options.vocab_size))
        write, store = timed(lambda: make_store(corpus, tokenizer, folder))
        count = store.num_tokens() + store.num_tokens("held_out")
        rates = f"{size / write.seconds:.1f}", f"{count / write.seconds:,.0f}"
        show(
            [
                ["step", "seconds", "memory, MB", "MB/s", "tokens/s"],
                ["find and check the text", *read.cells, f"{size / read.seconds:.1f}", ""],
                ["learn the tokenizer", *learn.cells, "", ""],
                ["write the store", *write.cells, *rates],
            ]
        )
        print()
        table = [["windows", "permutation, ms", "Grain, ms", "tokens/s", "4 threads, tokens/s"]]
        for windows in (0, *options.windows):
            # An array of one number takes no memory.
            tokens = store.tokens() if windows == 0 else np.broadcast_to(np.uint16(1), windows * WINDOW + 1)
            table.append(orders(TokenStream(tokens, WINDOW)))
        show(table)


class Cost(NamedTuple):
    """Seconds of a step, and the greatest memory of the process until its end, in MB."""

    seconds: float
    memory: float

    @property
    def cells(self) -> tuple[str, str]:
        return f"{self.seconds:.2f}", f"{self.memory:,.0f}"


def timed(work: Callable[[], Any]) -> tuple[Cost, Any]:
    """The cost of a step, and its result."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return Cost(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3), result


def orders(stream: Any) -> list[str]:
    """The line of a stream of windows."""
    from attnax.training import Batches

    batches = Batches(stream, batch_size=BATCH)
    rounds = max(3, min(ROUNDS, 30_000_000 // len(stream)))
    permuting = median(lambda number: permuted(stream, number), rounds)
    computing = median(lambda number: batches[number], 10 * ROUNDS)
    with batches.start(threads=4, ahead=16) as prefetched:
        next(prefetched)
        start = time.perf_counter()
        count = sum(1 for _ in itertools.islice(prefetched, 20 * ROUNDS))
        ahead = count / (time.perf_counter() - start)
    rates = (BATCH * WINDOW / computing, BATCH * WINDOW * ahead)
    return [f"{len(stream):,}", f"{permuting * 1e3:.2f}", f"{computing * 1e3:.2f}", *(f"{rate:,.0f}" for rate in rates)]


def permuted(stream: Any, number: int) -> np.ndarray:
    """A batch from a permutation of all windows, drawn for it."""
    order = np.random.default_rng([0, 0]).permutation(len(stream))
    places = [int(order[(number * BATCH + row) % len(stream)]) for row in range(BATCH)]
    return np.stack([stream[place]["tokens"] for place in places])


def median(work: Callable[[int], Any], rounds: int) -> float:
    """Median seconds of a call."""
    times = []
    for number in range(rounds):
        start = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
