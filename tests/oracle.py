"""Attention in float64 NumPy, written to be obviously right: loops over batch, heads and queries."""

import numpy as np


def attention(query, key, value, *, keep=None, score_mod=None, scale=None, keep_weights=None, dropout_rate=0.0):
    """(out, lse) in float64.

    Args:
        query: (B, N, T, H).
        key: (B, K, S, H).
        value: (B, K, S, Hv).
        keep: bool, broadcasts to (B, N, T, S).
        score_mod: NumPy function (scores, b, h, q, kv) -> scores.
        scale: of the scores.
        keep_weights: bool (B, N, T, S), the weights that dropout keeps.
        dropout_rate: the rate of dropout behind keep_weights.
    """
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    (batch, heads, seq_q, head_dim), (kv_heads, seq_kv) = query.shape, key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    keep = np.broadcast_to(True if keep is None else np.asarray(keep), (batch, heads, seq_q, seq_kv))
    out = np.zeros((batch, heads, seq_q, value.shape[-1]))
    lse = np.full((batch, heads, seq_q), -np.inf)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h * kv_heads // heads], value[b, h * kv_heads // heads]
            for q in range(seq_q):
                seen = np.flatnonzero(keep[b, h, q])
                scores = scale * keys[seen] @ query[b, h, q]
                if score_mod is not None:
                    scores = score_mod(scores, b, h, q, seen)
                seen, scores = seen[scores != -np.inf], scores[scores != -np.inf]
                if seen.size == 0:
                    continue
                lse[b, h, q] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
                weights = np.exp(scores - lse[b, h, q])
                if keep_weights is not None:
                    weights = np.where(keep_weights[b, h, q, seen], weights / (1 - dropout_rate), 0.0)
                out[b, h, q] = weights @ values[seen]
    return out, lse


def weights_and_score_gradients(
    query, key, value, cotangent, *, keep=None, score_mod=None, scale=None, keep_weights=None, dropout_rate=0.0, d_lse=0
):
    """(weights after dropout, d_scores), each (B, N, T, S) in float64; `cotangent` is of out, `d_lse` of lse (B, N, T).

    d_scores is the gradient of the score mod's result.
    """
    query, key, value, cotangent = (np.asarray(x).astype(np.float64) for x in (query, key, value, cotangent))
    (batch, heads, seq_q, head_dim), (kv_heads, seq_kv) = query.shape, key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    score_shape = batch, heads, seq_q, seq_kv
    keep = np.broadcast_to(True if keep is None else np.asarray(keep), score_shape)
    d_lse = np.broadcast_to(np.asarray(d_lse, np.float64), score_shape[:3])
    all_weights, all_d_scores = np.zeros(score_shape), np.zeros(score_shape)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h * kv_heads // heads], value[b, h * kv_heads // heads]
            for q in range(seq_q):
                seen = np.flatnonzero(keep[b, h, q])
                scores = scale * keys[seen] @ query[b, h, q]
                if score_mod is not None:
                    scores = score_mod(scores, b, h, q, seen)
                seen, scores = seen[scores != -np.inf], scores[scores != -np.inf]
                if seen.size == 0:
                    continue
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                kept = 1.0 if keep_weights is None else keep_weights[b, h, q, seen] / (1 - dropout_rate)
                d_weights = kept * (values[seen] @ cotangent[b, h, q])
                all_weights[b, h, q, seen] = kept * weights
                all_d_scores[b, h, q, seen] = weights * (d_weights - weights @ d_weights + d_lse[b, h, q])
    return all_weights, all_d_scores


def gradients(query, key, value, cotangent, *, scale=None, **options):
    """(dq, dk, dv) of sum(out * cotangent) in float64, from the formulas of the softmax.

    A score mod must only add to the scores. `options` are those of `weights_and_score_gradients`.
    """
    weights, d_scores = weights_and_score_gradients(query, key, value, cotangent, scale=scale, **options)
    query, key, cotangent = (np.asarray(x).astype(np.float64) for x in (query, key, cotangent))
    (batch, heads, _, head_dim), kv_heads = query.shape, key.shape[1]
    d_scores = d_scores * (head_dim**-0.5 if scale is None else scale)
    grads = np.zeros(query.shape), np.zeros(key.shape), np.zeros((*key.shape[:3], cotangent.shape[3]))
    for b in range(batch):
        for h in range(heads):
            g = h * kv_heads // heads
            grads[0][b, h] = d_scores[b, h] @ key[b, g]
            grads[1][b, g] += d_scores[b, h].T @ query[b, h]
            grads[2][b, g] += weights[b, h].T @ cotangent[b, h]
    return grads


def rms_error(actual, expected):
    """Root mean square of the difference, relative to that of `expected` (or absolute if `expected` is exactly 0)."""
    expected = np.asarray(expected, np.float64)
    difference = np.asarray(actual).astype(np.float64) - expected
    return np.sqrt((difference**2).mean()) / (np.sqrt((expected**2).mean()) or 1.0)
