"""Attention, a model and a text with the installed package, without packages that only the tests need.

python tests/smoke.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax import TransformerLM, flash_attention, masks, standard_attention

query = jax.random.normal(jax.random.key(0), (1, 4, 61, 8))
mask = masks.causal() & (lambda b, h, q, kv: abs(q - kv) < 7)
want = standard_attention(query, query, query, mask=mask)
np.testing.assert_allclose(flash_attention(query, query, query, mask=mask), want, atol=1e-5)

model = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=16, max_len=32)
prompt = jnp.array([[1, 2, 3]])
first = model(prompt)[:, -1].argmax(-1)
assert model.generate(prompt, max_new_tokens=2).tokens[:, 0] == first
print("attnax works")
