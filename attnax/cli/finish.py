"""The end of a run: the score of all held-out text, a curve, a text that the model writes, and the result."""

from __future__ import annotations

import json

import jax

from attnax.cli import terminal
from attnax.cli.compression import compressed_sizes, decode_in_pieces
from attnax.cli.generate import write_text
from attnax.cli.session import SAMPLER, Session
from attnax.distributed import is_main
from attnax.training import open_run
from attnax.training.durable import naming, write_durable
from attnax.visualize import plot_training

__all__ = ["finish"]


def finish(session: Session) -> None:
    """Saves the figures, the picture and the text with the run, and prints them; result.json is written last.

    In several processes all score the text, and process 0 does the rest.

    Raises:
        DivergenceError: the loss on held-out text is not finite.
    """
    run, tokens = session.run, session.tokens
    scores = session.bits_per_byte(tokens.held_out, tokens.held_out_bytes)
    if not is_main():
        return
    sizes = compressed_sizes(decode_in_pieces(tokens.held_out_texts, session.data.tokenizer))
    figures: dict[str, float] = {
        "held_out_bytes": tokens.held_out_bytes,
        **scores,
        "gzip_bits_per_byte": 8 * sizes.gzip / sizes.text,
        "xz_bits_per_byte": 8 * sizes.xz / sizes.text,
        "skipped_updates": session.skipped,
    }
    metrics = run.read_metrics()
    if any(row.get("loss") is not None for row in metrics):
        with naming(run.path / "loss.png"):
            plot_training(metrics, run.path / "loss.png")
    sample = _write_sample(session)
    write_durable(run.path / "sample.txt", sample)
    write_durable(run.result, json.dumps(figures, indent=2) + "\n")  # written last: it marks the run as finished
    print(f"\n{sample}\n")
    prompt = " --prompt 'def '" if session.options.data is None else ""
    print(f"go on with  {terminal.command_name()} generate {run.path}{prompt}")
    if figures["skipped_updates"]:
        print("{skipped_updates} updates were left out: they were not finite".format(**figures))
    print(
        "held-out {held_out_bits_per_byte:.2f} bits per byte "
        "(gzip -9: {gzip_bits_per_byte:.2f}, xz -9: {xz_bits_per_byte:.2f})".format(**figures)
    )
    if "ema_held_out_bits_per_byte" in figures:
        print("average  {ema_held_out_bits_per_byte:.2f} bits per byte, with --weights ema".format(**figures))


def _write_sample(session: Session) -> str:
    """A text of the model, or nothing if the default device has too little memory for all of its parameters."""
    try:
        return "".join(write_text(open_run(session.run.path), "", None, SAMPLER, session.options.seed))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        terminal.warn("one device has too little memory for the whole model, which therefore writes no sample.")
        return ""
