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


def heads(layer, x, count):
    """(B, N, T, H) of a projection."""
    return layer(x).reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def joined(out):
    return out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)


def projected(layer, x):
    sizes = layer.config.num_heads, layer.config.kv_heads, layer.config.kv_heads
    return (heads(part, x, count) for part, count in zip((layer.query, layer.key, layer.value), sizes, strict=True))


def causal_heads(query, key, value, bias=0.0):
    return attend(query, key, value, causal(query.shape[2]), bias)


def hidden_states(model, ids, attention):
    """The hidden states of a model whose layers have `attention(block, normed x)`."""
    x = model.decoder.embed(ids)
    for block in model.decoder.stack.blocks:
        x = x + attention(block, block.around_attention.norm_in(x))
        x = x + block.feed_forward(block.around_feed_forward.norm_in(x))
    return model.decoder.norm(x)


def plain_attention(block, x):
    return block.attention.out(joined(causal_heads(*projected(block.attention, x))))


def latent_attention(model, ids):
    """With the keys and values of each head, which the projections of the idea hold inside."""

    def turned(x):  # pairs of halves, by angles that fall with the pair
        size = x.shape[3] // 2
        angles = np.arange(x.shape[2])[:, None] / 10_000.0 ** (np.arange(size) / size)[None]
        sine, cosine = np.sin(angles)[None, None], np.cos(angles)[None, None]
        one, two = x[..., :size], x[..., size:]
        return jnp.concatenate([one * cosine - two * sine, two * cosine + one * sine], axis=3)

    def attention(block, x):
        layer = block.attention
        count, latent = layer.num_heads, heads(layer.latent, x, 1)
        scores = heads(layer.query, x, count) @ latent.swapaxes(2, 3)
        scores += turned(heads(layer.turned_query, x, count)) @ turned(heads(layer.turned_key, x, 1)).swapaxes(2, 3)
        weights = softmax(scores / np.sqrt(12), causal(x.shape[1]))
        return layer.out(joined(weights @ latent))

    return hidden_states(model, ids, attention)


def gated_attention(model, ids):
    def attention(block, x):
        layer = block.attention
        return layer.out(joined(causal_heads(*projected(layer, x))) * jax.nn.sigmoid(layer.gate(x)))

    return hidden_states(model, ids, attention)


def forget_gate(model, ids):
    def attention(block, x):
        layer = block.attention
        gate = heads(layer.token_scalars.gate, x, layer.config.num_heads)[..., 0]
        query, key, value = projected(layer, x)
        return layer.out(joined(forgetting_attention(query, key, value, gate)))

    return hidden_states(model, ids, attention)


def differential_heads(model, ids):
    def attention(block, x):
        layer = block.attention
        query, key, value = projected(layer, x)
        pairs = [(x[..., : x.shape[3] // 2], x[..., x.shape[3] // 2 :]) for x in (query, key)]
        function = layer.attention_fn
        out = differential_attention(*pairs, value, function.share[...])
        return layer.out(joined(0.2 * function.norm(out)))

    return hidden_states(model, ids, attention)


def value_residual(model, ids):
    first = []

    def attention(block, x):
        layer = block.attention
        query, key, value = projected(layer, x)
        if first:
            one, own = block.shares[...]
            value = one * first[0] + own * value
        else:
            first.append(value)
        return layer.out(joined(causal_heads(query, key, value)))

    return hidden_states(model, ids, attention)


def hyper_connections(model, ids):
    one = two = model.decoder.embed(ids)
    for block in model.decoder.stack.blocks:
        for n in range(2):
            read, write, mix = (x[...][n] for x in (block.reads, block.writes, block.mixes))
            x = read[0] * one + read[1] * two
            if n == 0:
                x = plain_attention(block, block.around_attention.norm_in(x))
            else:
                x = block.feed_forward(block.around_feed_forward.norm_in(x))
            one, two = (mix[0, m] * one + mix[1, m] * two + write[m] * x for m in range(2))
    return model.decoder.norm(one + two)


def layer_embeddings(model, ids):
    x = model.decoder.embed(ids)
    for block in model.decoder.stack.blocks:
        x = x + block.table[...][ids]
        x = x + plain_attention(block, block.around_attention.norm_in(x))
        x = x + block.feed_forward(block.around_feed_forward.norm_in(x))
    return model.decoder.norm(x)


def early_exit(model, ids):
    """The model has lost its second layer."""
    [block] = model.decoder.stack.blocks
    x = model.decoder.embed(ids)
    x = x + plain_attention(block, block.around_attention.norm_in(x))
    return model.decoder.norm(x + block.feed_forward(block.around_feed_forward.norm_in(x)))


def several_tokens(model, ids):
    hidden, losses = hidden_states(model, ids, plain_attention), []
    for ahead, head in enumerate((model.head, *model.further), 1):
        logits = head.projection(hidden)[:, :-ahead]
        right = jnp.take_along_axis(logits, ids[:, ahead:, None], axis=2)[..., 0]
        losses.append((jax.scipy.special.logsumexp(logits, axis=2) - right).mean())
    return jnp.stack(losses)
