"""Every piece of a transformer by itself, from the attention function to the whole model, with the shape of its result.

Takes 24 seconds of processor time on an Intel Xeon with AVX-512.
Run it with `python examples/component_demo.py`. Letters are as in the library: B batch, T target tokens, S source
tokens, N heads, H head dim, D model, V vocabulary.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from attnax import (
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    LearnedPositionalEmbedding,
    MultiHeadAttention,
    PositionalEncoding,
    Sampler,
    TokenEmbedding,
    Transformer,
    TransformerConfig,
    TransformerDecoder,
    TransformerEncoder,
    TransformerLM,
    masks,
    standard_attention,
)
from attnax.visualize import plot_attention


def show(piece: str, letters: str, array: jax.Array) -> None:
    """Prints one line of the table."""
    print(f"{piece:<38} ({letters:<10}) {array.shape}")


def main(seed: int = 0, out: Path = Path("components.png")) -> None:
    """Builds every piece at a small size, prints the shape of its result, and draws the weights of a layer in `out`."""
    batch, source_length, target_length = 2, 7, 5
    config = TransformerConfig(
        vocab_size=100,
        d_model=32,
        num_heads=4,
        num_layers=2,
        d_ff=64,
        max_len=16,
        dropout_rate=0.1,
        ff_activation="relu",
    )
    rngs, keys = nnx.Rngs(seed), iter(jax.random.split(jax.random.key(seed), 4))
    source = jax.random.randint(next(keys), (batch, source_length), 3, config.vocab_size)
    target = jax.random.randint(next(keys), (batch, target_length), 3, config.vocab_size)

    query, key, value = jax.random.normal(next(keys), (3, batch, config.num_heads, target_length, config.head_size))
    show("scaled dot-product attention", "B, N, T, H", standard_attention(query, key, value))
    show("the same under a causal mask", "B, N, T, H", standard_attention(query, key, value, mask=masks.causal()))

    embedded = TokenEmbedding(rngs, config.vocab_size, config.d_model)(target)
    show("token embedding", "B, T, D", embedded)
    show("sinusoidal positions", "B, T, D", PositionalEncoding(config.max_len, config.d_model)(embedded))
    learned = LearnedPositionalEmbedding(rngs, num_positions=config.max_len, d_model=config.d_model)
    show("learned positions", "B, T, D", learned(embedded))

    attention = MultiHeadAttention(rngs, config)
    show("multi-head attention", "B, T, D", attention(embedded))
    weights = attention.attention_weights(embedded, mask=masks.causal())
    show("its weights", "B, N, T, T", weights)
    plot_attention(weights, path=out)
    show("feed-forward", "B, T, D", FeedForward(rngs, config)(embedded))
    show("encoder block", "B, T, D", EncoderBlock(rngs, config)(embedded))

    encoded = TransformerEncoder(rngs, config)(source)
    show("encoder", "B, S, D", encoded)
    block = DecoderBlock(rngs, config)
    show("decoder block", "B, T, D", block(embedded, encoder_output=encoded, self_mask=masks.causal()))
    decoder = TransformerDecoder(rngs, config, cross_attention=True)
    show("decoder", "B, T, D", decoder(target, encoder_output=encoded))

    model = Transformer(rngs, encoder=config, decoder=config)
    show("encoder-decoder, log-probabilities", "B, T, V", model.log_probs(source, target))
    written = model.generate(source, max_length=6, start_token=1, end_token=2)
    show("encoder-decoder, written", "B, 6", written.tokens)

    lm = TransformerLM(rngs, config)
    show("language model, log-probabilities", "B, T, V", lm.log_probs(target))
    written = lm.generate(target, max_new_tokens=6, sampler=Sampler(temperature=0.8), key=next(keys))
    show("language model, written", "B, 6", written.tokens)

    parameters = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
    finite = jnp.isfinite(model.log_probs(source, target)).all()
    print(f"the encoder-decoder has {parameters:,} parameters; its log-probabilities are finite: {finite}")


if __name__ == "__main__":
    main()
