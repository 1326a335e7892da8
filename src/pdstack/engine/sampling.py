"""Choosing the next token from logits.

Randomness is a function of (seed, position of the token in its sequence), not of a stream: prefill, decode and a worker
that takes a request over all draw the same number for the same place.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

__all__ = ["greedy", "sample", "uniform"]

_BLOCK = 64
_FEW = 512


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), 53 bits, that depends on `seed` (any int) and `position` only."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def greedy(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The first largest entry of each column of `logits` (vocabulary, columns).

    In two steps over blocks of the vocabulary: numpy's argmax over the long axis copies the whole array first.
    """
    vocabulary, columns = logits.shape
    if vocabulary % _BLOCK:
        whole: npt.NDArray[np.int64] = logits.argmax(axis=0)
        return whole
    blocks = logits.reshape(-1, _BLOCK, columns)
    best = blocks.max(axis=1).argmax(axis=0)
    within = blocks[best, :, np.arange(columns)].argmax(axis=1)
    chosen: npt.NDArray[np.int64] = best * _BLOCK + within
    return chosen


def sample(
    logits: npt.NDArray[np.float32], *, temperature: float, top_p: float, top_k: int, seed: int, position: int
) -> int:
    """Draw one token from `logits` (vocabulary,). temperature > 0; top_p 1.0 and top_k 0 are off.

    top_k keeps the k likeliest tokens, then top_p the fewest whose share of the rest reaches it (at least one). Equal
    logits are ordered by token id.
    """
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max()
    if 0 < top_k < scaled.size:
        candidates, complete = _likeliest(scaled, top_k), True
    elif top_p < 1.0:
        candidates, complete = _likeliest(scaled, min(_FEW, scaled.size)), scaled.size <= _FEW
    else:
        candidates, complete = np.arange(scaled.size), True
    shares = np.exp(scaled[candidates])
    total = float(shares.sum() if complete else np.exp(scaled).sum())
    if not complete and float(shares.sum()) < top_p * total:
        candidates = _likeliest(scaled, scaled.size)
        shares = np.exp(scaled[candidates])
    running = np.cumsum(shares)
    if top_p < 1.0:
        kept = min(int(np.searchsorted(running, top_p * total)) + 1, running.size)
        running = running[:kept]
    drawn = uniform(seed, position) * float(running[-1])
    place = min(int(np.searchsorted(running, drawn, side="right")), running.size - 1)
    return int(candidates[place])


def _likeliest(scaled: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The `count` largest entries, largest first, ties by index."""
    if count < scaled.size:
        threshold = np.partition(scaled, scaled.size - count)[scaled.size - count]
        above = np.flatnonzero(scaled > threshold)
        equal = np.flatnonzero(scaled == threshold)[: count - above.size]
        chosen = np.sort(np.concatenate([above, equal]))
    else:
        chosen = np.arange(scaled.size)
    return chosen[np.argsort(-scaled[chosen], kind="stable")]
