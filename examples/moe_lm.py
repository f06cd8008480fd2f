"""A language model with a mixture of experts in every other layer, and the load of its experts.

The model trains on the bytes of Python's standard library. The script prints how evenly the experts
are used: the load-balance loss is 1 if all experts get the same share.
Takes 49 seconds of processor time on an Intel Xeon with AVX-512.

    python examples/moe_lm.py --steps 300
"""

import argparse
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from attnax import TransformerConfig
from attnax.text import byte_tokenizer
from attnax.training import Batches, OptimizerConfig, TokenStream, Trainer, causal_lm, read_corpus

CONFIG = TransformerConfig(
    vocab_size=257,
    d_model=96,
    num_heads=3,
    num_layers=4,
    d_ff=192,
    max_len=128,
    pos_emb_type="rope",
    norm_type="rms",
    ff_activation="swiglu",
    use_bias=False,
    dropout_rate=0.0,
    layer_pattern=({}, {"num_experts": 8, "top_k": 2}),
)


def main(arguments=None):
    """Returns the first and the last loss in nats per byte."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", default=None, help="a file, a folder or a glob; by default the standard library")
    parser.add_argument("--out", type=Path, default=Path("moe.png"), help="path of the picture of the loads")
    options = parser.parse_args(arguments)
    corpus, tokenizer = read_corpus(options.data), byte_tokenizer()
    stream = TokenStream(
        tokenizer.encode_documents([d.text for d in itertools.islice(corpus.train, 200)]), CONFIG.max_len
    )
    batches = Batches(stream, batch_size=8)
    trainer = Trainer(CONFIG, causal_lm(), OptimizerConfig(steps=options.steps))

    @jax.jit
    def statistics(params, tokens):
        aux = trainer.merge(params).run(tokens[:, :-1], deterministic=True).aux
        loads = aux.pop("expert_load")  # one array for each layer with experts; the numbers are sums over these layers
        return {name: value / len(loads) for name, value in aux.items()}, jnp.stack(loads)

    state, losses, history = trainer.init(), [], []
    for step in range(options.steps):
        batch = batches[step]
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.loss))
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            aux, loads = statistics(state.params, batch["tokens"][0])
            history.append((step, np.asarray(loads[-1])))
            load = " ".join(f"{share:4.0%}" for share in np.asarray(loads[-1]))
            print(
                f"step {step:4}  loss {losses[-1]:.3f}  balance {float(aux['load_balance_loss']):.2f}  "
                f"entropy {float(aux['router_entropy']):.2f} of {np.log(8):.2f}  last layer's experts {load}"
            )
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.stackplot([step for step, _ in history], np.stack([load for _, load in history]).T)
    axes.set(xlabel="step", ylabel="share of the tokens", title="The last layer's experts", ylim=(0, 1))
    figure.savefig(options.out)
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
