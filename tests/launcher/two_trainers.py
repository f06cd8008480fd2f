"""A trainer on layouts that go over two processes; prints the losses and a digest of the last state, twice."""

import hashlib

import jax
import numpy as np

from attnax import Layout, TransformerConfig
from attnax.distributed import connect, disconnect
from attnax.training import Batches, OptimizerConfig, TokenStream, Trainer, causal_lm

LAYOUTS = ("fsdp=4", "data=2,tensor=2", "fsdp=2,context=2", "tensor=2,context=2")
UPDATES = 4


def train(layout):
    """The losses of some updates, the digest of the state and the bits of a text."""
    model = TransformerConfig(vocab_size=64, d_model=16, num_heads=2, num_layers=1, d_ff=24, max_len=16)
    optimizer = OptimizerConfig(steps=UPDATES, batch_size=4, accumulate=2)
    trainer = Trainer(model, causal_lm(), optimizer, layout=layout)
    stream = TokenStream(np.random.default_rng(0).integers(0, 64, 1000).astype(np.uint16), 16)
    batches = Batches(stream, batch_size=4, accumulate=2, part=trainer.part)
    state, losses = trainer.init(), []
    for update in range(UPDATES):
        state, metrics = trainer.step(state, batches[update])
        losses.append(float(metrics.loss))
    digest = hashlib.sha256()
    for x in jax.tree.leaves(state):
        for shard in sorted(x.addressable_shards, key=lambda shard: shard.device.id):
            digest.update(np.asarray(shard.data).tobytes())
    return [*losses, trainer.bits(state.params, TokenStream(stream.tokens[:60], 16))], digest.hexdigest()


if __name__ == "__main__":
    connect(seconds=60)
    for text in LAYOUTS:
        (losses, digest), (_, again) = (train(Layout.parse(text)) for _ in range(2))
        print(text, digest == again, *losses)
    disconnect()
