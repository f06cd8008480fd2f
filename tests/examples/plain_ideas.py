"""The ideas of the gallery as their papers define them: all pairs in arrays, one softmax or what stands in its place.

A function has the name and the arguments of its idea. No kernel, mask or score mod of the library is used.
"""

import jax
import jax.numpy as jnp
import numpy as np


def repeated(x, query):
    """Keys or values, one for each query head."""
    return jnp.repeat(x, query.shape[1] // x.shape[1], axis=1)


def products(query, key):
    """Scaled scores (B, N, T, S)."""
    return query @ repeated(key, query).swapaxes(2, 3) / np.sqrt(query.shape[3])


def softmax(scores, keep):
    """The softmax over the allowed keys; rows without one are 0."""
    raised = jnp.where(keep, jnp.exp(scores), 0)
    total = raised.sum(3, keepdims=True)
    return raised / jnp.where(total == 0, 1, total)


def times(weights, value, query):
    """The sum of the values with their weights."""
    return weights @ repeated(value, query)


def index(length, keys=None):
    """Columns of queries and rows of keys, of four axes."""
    return np.arange(length)[None, None, :, None], np.arange(keys or length)[None, None, None]


def causal(length):
    q, kv = index(length)
    return kv <= q


def attend(query, key, value, keep, bias=0.0):
    return times(softmax(products(query, key) + bias, keep), value, query)


def differential_attention(query, key, value, weight):
    one, two = (softmax(products(q, k), causal(q.shape[2])) for q, k in zip(query, key, strict=True))
    return times(one - weight[None, :, None, None] * two, value, query[0])


def sink_attention(query, key, value, sink):
    raised = jnp.where(causal(query.shape[2]), jnp.exp(products(query, key)), 0)
    total = raised.sum(3, keepdims=True) + jnp.exp(sink)[None, :, None, None]
    return times(raised / total, value, query)


def sigmoid_attention(query, key, value, bias):
    weights = 1 / (1 + jnp.exp(-products(query, key) - bias[None, :, None, None]))
    return times(jnp.where(causal(query.shape[2]), weights, 0), value, query)


def softpick(query, key, value):
    rest = jnp.where(causal(query.shape[2]), jnp.exp(products(query, key)) - 1, 0)
    return times(jnp.maximum(rest, 0) / (abs(rest).sum(3, keepdims=True) + 1e-6), value, query)


def stick_breaking_attention(query, key, value):
    taken = jax.nn.sigmoid(products(query, key))
    length, columns = query.shape[2], []
    left = jnp.ones(taken.shape[:3], taken.dtype)
    for kv in reversed(range(length)):  # from the key before a query back to the first
        part = jnp.where(np.arange(length) > kv, taken[..., kv], 0)
        columns.insert(0, part * left)
        left = left * (1 - part)
    return times(jnp.stack(columns, axis=3), value, query)


def talking_heads(query, key, value, before, after):
    mixed = jnp.einsum("bnts,nm->bmts", products(query, key), before)
    return jnp.einsum("bnts,nm->bmts", softmax(mixed, causal(query.shape[2])), after) @ value


def forgetting_attention(query, key, value, gate):
    length = gate.shape[2]
    q, kv = index(length)
    between = (np.arange(length) > kv[..., None]) & (np.arange(length) <= q[..., None])
    kept = jnp.prod(jnp.where(between, jax.nn.sigmoid(gate)[:, :, None, None], 1), axis=4)
    raised = jnp.where(causal(length), jnp.exp(products(query, key)) * kept, 0)
    return times(raised / raised.sum(3, keepdims=True), value, query)


def contextual_positions(query, key, value, table):
    """The listing of the paper's appendix."""
    scores = products(query, key)
    length, most = query.shape[2], table.shape[1] - 1
    gates = jnp.where(causal(length), jax.nn.sigmoid(scores), 0)
    distance = gates @ np.tril(np.ones((length, length)))  # the sum from a key on
    distance = jnp.minimum(distance, most)
    low, high = jnp.floor(distance), jnp.ceil(distance)
    embedded = query @ table
    at = lambda whole: sum(jnp.where(whole == n, embedded[..., n : n + 1], 0) for n in range(most + 1))
    part = distance - low
    return attend(query, key, value, causal(length), at(high) * part + at(low) * (1 - part))


def adaptive_positions(query, key, value, slopes, inner, outer):
    scores = products(query, key)
    q, kv = index(query.shape[2])
    bias = jnp.broadcast_to(-slopes[None, :, None, None] * abs(q - kv), scores.shape)
    each = jnp.moveaxis(jnp.concatenate([scores, bias], axis=1), 1, 3)
    hidden = each @ inner
    added = jnp.moveaxis(jnp.where(hidden > 0, hidden, 0.01 * hidden) @ outer, 3, 1)
    return attend(query, key, value, causal(query.shape[2]), bias + added)


def best_blocks(scores, own, top):
    """The blocks of each query: its own, and those before with fewer than `top - 1` better ones before."""
    blocks = np.arange(scores.shape[3])
    before = (blocks[None] < own[:, None])[None, None]
    better = (scores[..., None, :] > scores[..., :, None]) & before[..., None, :]
    return (blocks[None] == own[:, None])[None, None] | (before & (better.sum(4) < top - 1))


def block_attention(query, key, value, block, top=3):
    length = query.shape[2]
    means = jnp.stack([key[:, :, start : start + block].mean(2) for start in range(0, length, block)], axis=2)
    chosen = best_blocks(query @ means.swapaxes(2, 3), np.arange(length) // block, top)
    return attend(query, key, value, causal(length) & jnp.repeat(chosen, block, axis=3))


def native_sparse_attention(query, key, value, pool, gates, top, window):
    length, block, groups = query.shape[2], len(pool), key.shape[1]
    starts = range(0, length, block)
    summed = lambda x: jnp.stack([(x[:, :, s : s + block] * pool[None, None, :, None]).sum(2) for s in starts], axis=2)
    q, _ = index(length)
    ended = (np.array(starts) + block - 1)[None, None, None] <= q
    coarse = attend(query, summed(key), summed(value), ended)
    of_blocks = softmax(products(query, summed(key)), ended)
    of_blocks = of_blocks.reshape(len(query), groups, -1, *of_blocks.shape[2:]).sum(2)
    chosen = repeated(best_blocks(of_blocks, np.arange(length) // block, top), query)
    fine = attend(query, key, value, causal(length) & jnp.repeat(chosen, block, axis=3))
    q, kv = index(length)
    near = attend(query, key, value, causal(length) & (q - kv < window))
    gates = jax.nn.sigmoid(gates)[..., None]
    return gates[0] * coarse + gates[1] * fine + gates[2] * near


def packed_prefixes(query, key, value, cu_seqlens, is_prefix):
    length = query.shape[2]
    ids = np.repeat(np.arange(len(cu_seqlens)), np.diff([*cu_seqlens, length]))
    same = (ids[:, None] == ids[None]) & (ids < len(cu_seqlens) - 1)[:, None]
    return attend(query, key, value, same[None, None] & (causal(length) | is_prefix[None, None, None]))


def big_bird(query, key, value, links, block, window, hubs):
    q, kv = index(query.shape[2])
    far = links.repeat(block, axis=0).repeat(block, axis=1)
    return attend(query, key, value, (abs(q - kv) < window) | (q < hubs) | (kv < hubs) | far[None, None])


def neighbourhood_attention(query, key, value, width, size):
    length = query.shape[2]
    keep = np.zeros((length, length), bool)
    starts = lambda at, end: min(max(at - size // 2, 0), end - size)
    for y in range(length // width):
        for x in range(width):
            top, left = starts(y, length // width), starts(x, width)
            for row in range(top, top + size):
                keep[y * width + x, row * width + left : row * width + left + size] = True
    return attend(query, key, value, keep[None, None])


def shared_prefix_attention(query, prefix_key, prefix_value, key, value):
    rows, _, length, _ = query.shape
    key, value = (
        jnp.concatenate([jnp.repeat(prefix, rows, axis=0), own], axis=2)
        for prefix, own in ((prefix_key, key), (prefix_value, value))
    )
    q, kv = index(length, key.shape[2])
    return attend(query, key, value, kv - prefix_key.shape[2] <= q)


def tree_attention(query, text_key, text_value, key, value, parents):
    count, length = len(parents), text_key.shape[2]
    keep = np.ones((count, length + count), bool)
    for draft in range(count):
        path = {draft}
        while min(path) > 0:
            path.add(int(parents[min(path)]))
        keep[draft, length:] = [other in path for other in range(count)]
    key, value = jnp.concatenate([text_key, key], axis=2), jnp.concatenate([text_value, value], axis=2)
    return attend(query, key, value, keep[None, None])
