"""A transformer reads dates in 70 languages and writes them in ISO 8601: "sobota, 3 kwietnia 2021" becomes 2021-04-03.

Babel writes the dates (see written_dates.py). The model gets the characters of a date, not the locale. No day of
the test is in the training data, in any language.

Takes 2 minutes 10 seconds of processor time on an Intel Xeon with AVX-512.
Run it with `python examples/dates.py`; `--help` lists the options. Needs attnax[examples].
"""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from written_dates import LOCALES, make_pairs

from attnax import EncoderDecoderConfig, Transformer, TransformerConfig, masks
from attnax.training import OptimizerConfig, Trainer, seq2seq
from attnax.visualize import plot_attention

PADDING = "\0"
TARGET_ALPHABET = "0123456789-<>"  # a target is written as <2021-04-03>


def encode(texts: Sequence[str], alphabet: str, width: int) -> np.ndarray:
    """Indices of the characters (texts, width); 0 is a character that the alphabet lacks, or padding at the end."""
    indices = np.zeros(sys.maxunicode + 1, np.int32)
    indices[[ord(character) for character in alphabet]] = np.arange(len(alphabet))
    return indices[np.array(texts, f"U{width}").view(np.uint32).reshape(-1, width)]


def draw_attention(model: Transformer, source: np.ndarray, text: str, iso: str, path: Path) -> None:
    """Draws the attention of the decoder's only layer to the text, for each character of the ISO date."""
    encoded = model.encoder(source)
    [block] = model.decoder.stack.layers()
    x = model.decoder.embed(encode([f"<{iso[:-1]}"], TARGET_ALPHABET, len(iso)))
    x, _ = block.around_attention(x, lambda x: (block.attention(x, mask=masks.causal()), None))
    look = partial(block.cross_attention.attention_weights, context=encoded)
    _, weights = block.around_cross_attention(x, lambda x: (x, look(x)))
    plot_attention(weights, path=path, query_labels=list(iso), key_labels=list(text))


def main(
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    d_model: int = 64,
    num_layers: int = 2,
    num_test: int = 2000,
    locales: str = LOCALES,
    seed: int = 0,
    out: Path = Path("dates.png"),
) -> float:
    """Trains on written dates, reads held-out dates, draws an attention map, and returns the accuracy.

    Args:
        steps: updates of the parameters.
        batch_size: dates in a step.
        learning_rate: the peak; it warms up and then decays along a cosine.
        d_model: width of the model, a multiple of 8.
        num_layers: depth of the encoder; the decoder has one layer.
        num_test: number of held-out days.
        locales: Babel's names, with spaces between them.
        seed: of the split, the styles, the initial weights and the batches.
        out: path of the picture.
    """
    pairs = make_pairs(locales, seed)
    test, train = pairs[:num_test], pairs[num_test:]
    alphabet = PADDING + "".join(sorted(set("".join(text for text, _ in train))))
    longest = max(len(text) for text, _ in pairs)
    print(f"{len(train)} days to learn from, {len(test)} held out; {len(alphabet)} characters", flush=True)

    buckets = []  # two widths, two compiled programs: short texts are not padded to the longest
    for shortest, width in ((0, longest // 2), (longest // 2, longest)):
        bucket = [(text, f"<{iso}>") for text, iso in train if shortest < len(text) <= width]
        sources = encode([text for text, _ in bucket], alphabet, width)
        buckets.append((sources, encode([target for _, target in bucket], TARGET_ALPHABET, 12)))
    shares = [len(sources) / len(train) for sources, _ in buckets]

    encoder = TransformerConfig(
        vocab_size=len(alphabet),
        d_model=d_model,
        num_heads=4,
        num_layers=num_layers,
        d_ff=2 * d_model,
        pos_emb_type="rope",
        dropout_rate=0.0,
    )
    decoder = dataclasses.replace(encoder, vocab_size=len(TARGET_ALPHABET), num_layers=1)
    config = EncoderDecoderConfig(encoder=encoder, decoder=decoder)
    trainer = Trainer(
        config, seq2seq(source_padding=0), OptimizerConfig(steps=steps, learning_rate=learning_rate), seed=seed
    )
    state, losses, rng = trainer.init(), [], np.random.default_rng(seed)
    for step in range(1, steps + 1):
        sources, targets = buckets[rng.choice(len(buckets), p=shares)]
        rows = rng.integers(len(sources), size=(1, batch_size))  # one microbatch
        state, metrics = trainer.step(state, {"source": sources[rows], "target": targets[rows]})
        losses.append(metrics.loss)
        if step % 100 == 0 or step == steps:
            print(f"step {step:4}  loss {np.mean(losses[-100:]):.4f}", flush=True)

    model = trainer.merge(state.params)
    source = encode([text for text, _ in test], alphabet, longest)
    start, end = TARGET_ALPHABET.index("<"), TARGET_ALPHABET.index(">")
    tokens = model.generate(source, 11, start_token=start, end_token=end, source_padding_mask=source != 0).tokens
    written = ["".join(TARGET_ALPHABET[token] for token in row).partition(">")[0] for row in np.asarray(tokens)]
    right = [guess == iso for guess, (_, iso) in zip(written, test, strict=True)]
    for guess, (text, iso) in list(zip(written, test, strict=True))[:10]:
        print(f"{guess}  {'' if guess == iso else f'(not {iso})  '}{text}")
    print(f"held-out accuracy {np.mean(right):.4f}")

    # The longest ASCII text (the picture's font has no more) with the year at its end: ISO 8601 begins with the year.
    row = int(np.argmax([len(text) * (text.isascii() and text.endswith(iso[:4])) for text, iso in test]))
    draw_attention(model, source[row : row + 1, : len(test[row][0])], *test[row], out)
    return float(np.mean(right))


if __name__ == "__main__":
    tyro.cli(main)
