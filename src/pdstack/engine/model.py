"""The forward pass of a Llama-family model over a paged KV pool, with numpy.

numpy and not torch: measured on two cores, numpy took 28-42 ms a token where torch took 50-52 (SmolLM2-135M, float32).

Results of a token depend on its position and the tokens before it, on nothing else: not on what else is in the batch,
where prefill chunks end, or whether a prefix came from the cache or another worker. That takes:

- matrix products at least as wide as `pdstack.engine.blas.probe_min_width` found safe;
- attention over keys padded to whole tiles of 128 absolute positions, so that a softmax always sums the same number of
  terms, and values summed tile by tile;
- keys stored transposed in their block. "Row times matrix" then runs along the key dimension in memory order, for which
  OpenBLAS gives the same bits for any number of queries above one; for the usual layout it does not (measured: below
  10 queries of head size 64 over 128 keys the bits differ).

Activations are (features, tokens): with the weights as stored, that was the fastest of the three orientations (4
columns: 82 ms a pass against 108, 128 columns: 395 against 432, one thread).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdstack.engine.blas import padded_width, probe_min_width, row_parts
from pdstack.engine.config import ATTENTION_TILE, EngineError
from pdstack.engine.team import Team
from pdstack.models.check import check_tensors, model_id
from pdstack.models.hf_config import ModelConfig
from pdstack.models.weights import open_weights

__all__ = ["KV_ORDER", "LlamaModel", "Segment"]

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

KV_ORDER = "k-dim-token,v-token-dim"
"""How a block is filled: keys (kv_heads, head_dim, block_size), values (block_size, kv_heads, head_dim)."""

_ONE = np.float32(1.0)

_GATHER_TOKENS = 4096
"""Most keys gathered at once for decode attention; keeps the copies inside the processor's caches."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence to compute: `tokens` at positions start, start + 1, ...; `blocks` hold its KV.

    wants_logits: the last token's logits are needed, to choose the next token.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wants_logits: bool


@dataclass(slots=True)
class _Layer:
    attention_norm: Array
    qkv: list[Array]
    o: Array
    mlp_norm: Array
    gate_up: list[Array]
    down: Array


@dataclass(slots=True)
class _Group:
    """Single tokens whose keys span equally many tiles: columns, block tables (tokens, blocks) and masks."""

    columns: Ints
    table: Ints
    bias: Array


@dataclass(slots=True)
class _Span:
    """Neighbouring tokens of one sequence inside one tile."""

    first: int
    count: int
    table: Ints
    bias: Array


class LlamaModel:
    """Weights of one model and the arithmetic on them. `forward` must not run twice at the same time."""

    def __init__(self, directory: Path, threads: int = 1) -> None:
        """Map and check the weights of `directory`. Raises WeightsError or UnsupportedModel."""
        began = time.monotonic()
        self.config = config = ModelConfig.load(directory)
        tensors = open_weights(directory)
        check_tensors(directory, config, tensors)
        self.id = model_id(directory)

        def take(name: str) -> Array:
            return tensors[name].float32()

        def take_one(*names: str) -> list[Array]:
            parts = [take(name) for name in names]
            whole = _as_one(parts)
            return parts if whole is None else [whole]

        self._embedding = take("model.embed_tokens.weight")
        self._layers = []
        for layer in range(config.layers):
            at = f"model.layers.{layer}."
            self._layers.append(
                _Layer(
                    attention_norm=take(at + "input_layernorm.weight")[:, None],
                    qkv=take_one(*(at + f"self_attn.{name}_proj.weight" for name in "qkv")),
                    o=take(at + "self_attn.o_proj.weight"),
                    mlp_norm=take(at + "post_attention_layernorm.weight")[:, None],
                    gate_up=take_one(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
                    down=take(at + "mlp.down_proj.weight"),
                )
            )
        self._norm = take("model.norm.weight")[:, None]
        self._head = self._embedding if config.tied else take("lm_head.weight")
        self._min_width: dict[tuple[int, ...], int] = {}
        self._parts: dict[tuple[int, ...], list[slice]] = {}
        self._by_block: dict[tuple[int, int], bool] = {}
        self._cos = np.empty((config.head_dim // 2, 0), dtype=np.float32)
        self._sin = self._cos
        self.team = Team(threads)
        log.info("model %s mapped in %.2f s", directory, time.monotonic() - began)

    def prepare(self, max_context: int, largest_batch: int) -> bool:
        """Make the rotary tables and probe every matrix shape. Touches all weights once. False if a probe failed."""
        angles = self.config.inverse_frequencies()[:, None] * np.arange(max_context)
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        safe = True
        for layer in self._layers:
            for weights in (*layer.qkv, layer.o, *layer.gate_up, layer.down):
                safe &= self._probe(weights, largest_batch)
        return safe & self._probe(self._head, 16)

    def _probe(self, weights: Array, largest: int) -> bool:
        if weights.shape in self._min_width:
            weights.max()  # brings the pages in
            return True
        parts = self._parts[weights.shape] = row_parts(weights.shape, self.team.size)
        width = probe_min_width(weights, max(padded_width(largest, 8), 16), parts)
        self._min_width[weights.shape] = 64 if width is None else width
        if width is None:
            log.warning("products with %s weights depend on their batch with this BLAS", weights.shape)
        return width is not None

    def _block_by_block(self, block_size: int, queries: int) -> bool:
        """Whether keys may be multiplied where they lie, block by block, with the bits of one wide product.

        Measured: yes from 16 tokens a block on; narrower products take another kernel, so the keys are copied first.
        """
        known = self._by_block.get((block_size, queries))
        if known is None:
            keys, rows = _columns(self.config.head_dim, 8 * block_size), _columns(64, self.config.head_dim)
            blocks = np.ascontiguousarray(keys.reshape(-1, 8, block_size).transpose(1, 0, 2))
            parts = np.matmul(rows[:queries], blocks).transpose(1, 0, 2).reshape(queries, -1)
            known = self._by_block[block_size, queries] = np.array_equal(parts, (rows @ keys)[:queries])
        return known

    @property
    def min_width(self) -> int:
        """Columns that a forward pass computes at least."""
        return min(self._min_width.values(), default=4)

    def _times(self, weights: Array, columns: Array) -> Array:
        width = columns.shape[1]
        wanted = padded_width(width, self._min_width[weights.shape])
        if wanted != width:
            padded = np.zeros((columns.shape[0], wanted), dtype=np.float32)
            padded[:, :width] = columns
            columns = padded
        result = np.empty((weights.shape[0], wanted), dtype=np.float32)
        parts = self._parts[weights.shape]

        def piece(number: int) -> None:
            part = parts[number]
            np.matmul(weights[part], columns, out=result[part])

        self.team.run(piece, len(parts))
        return result if wanted == width else result[:, :width]

    def _all_times(self, parts: list[Array], columns: Array) -> Array:
        if len(parts) == 1:
            return self._times(parts[0], columns)
        return np.concatenate([self._times(part, columns) for part in parts])

    def _normed(self, x: Array, weight: Array) -> Array:
        mean = np.add.reduce(x * x, axis=0) / np.float32(x.shape[0])
        normed: Array = x * (_ONE / np.sqrt(mean + np.float32(self.config.norm_eps))) * weight
        return normed

    def forward(self, segments: Sequence[Segment], pool: Array) -> Array:
        """Compute `segments`, write their KV into `pool`, and return logits (vocabulary, segments that want them).

        pool: (blocks, layers, 2, block_size, kv_heads, head_dim), filled in KV_ORDER. The blocks of a segment that are
        written must belong to it alone. No sequence may appear twice.
        """
        cfg = self.config
        half = cfg.head_dim // 2
        block_size = pool.shape[3]
        flat = pool.reshape(pool.shape[0] * cfg.layers * 2, -1)
        halves = pool.reshape(pool.shape[0], cfg.layers, 2, -1)
        keys = halves[:, :, 0].reshape(pool.shape[0], cfg.layers, cfg.kv_heads, cfg.head_dim, block_size)
        values = pool[:, :, 1]

        real = sum(len(segment.tokens) for segment in segments)
        width = padded_width(real, self.min_width)
        tokens = np.zeros(width, dtype=np.int64)
        positions = np.zeros(width, dtype=np.int64)
        blocks = np.zeros(real, dtype=np.int64)
        groups, spans, last = self._layout(segments, block_size, tokens, positions, blocks, pool)
        offsets = positions[:real] % block_size
        cos, sin = self._cos[:, positions], self._sin[:, positions]
        attended = np.zeros((cfg.heads * cfg.head_dim, width), dtype=np.float32)

        x: Array = np.ascontiguousarray(self._embedding[tokens].T)
        rows_qk = (cfg.heads + cfg.kv_heads) * cfg.head_dim
        rows_q = cfg.heads * cfg.head_dim
        scale = np.float32(cfg.head_dim**-0.5)
        with np.errstate(over="ignore"):
            for index, layer in enumerate(self._layers):
                qkv = self._all_times(layer.qkv, self._normed(x, layer.attention_norm))
                qk = qkv[:rows_qk].reshape(-1, cfg.head_dim, width)
                turned = np.empty_like(qk)
                turned[:, :half] = qk[:, :half] * cos - qk[:, half:] * sin
                turned[:, half:] = qk[:, half:] * cos + qk[:, :half] * sin
                new_keys = turned[cfg.heads :, :, :real].transpose(2, 0, 1)
                keys[blocks, index, :, :, offsets] = new_keys
                values[blocks, index, offsets] = (
                    qkv[rows_qk:, :real].reshape(cfg.kv_heads, cfg.head_dim, real).transpose(2, 0, 1)
                )
                queries = (turned[: cfg.heads] * scale).reshape(cfg.kv_heads, -1, cfg.head_dim, width)
                self._attend(groups, spans, queries, flat, 2 * index, attended, block_size)
                x += self._times(layer.o, attended[:rows_q])
                gate_up = self._all_times(layer.gate_up, self._normed(x, layer.mlp_norm))
                gate, up = gate_up[: cfg.intermediate], gate_up[cfg.intermediate :]
                decay: Array = np.exp(-gate, dtype=np.float32)
                activated: Array = gate / (_ONE + decay) * up
                x += self._times(layer.down, activated)
        if not last:
            return np.empty((cfg.vocab_size, 0), dtype=np.float32)
        # Normalised at full width: a reduction over few columns may run in another order.
        return self._times(self._head, np.ascontiguousarray(self._normed(x, self._norm)[:, last]))

    def _layout(
        self,
        segments: Sequence[Segment],
        block_size: int,
        tokens: Ints,
        positions: Ints,
        blocks: Ints,
        pool: Array,
    ) -> tuple[list[_Group], list[_Span], list[int]]:
        """Fill the per-column arrays; sort single tokens into groups and longer segments into spans."""
        singles: dict[int, list[tuple[int, int, Sequence[int]]]] = {}
        spans: list[_Span] = []
        last: list[int] = []
        at = 0
        for segment in segments:
            count, start = len(segment.tokens), segment.start
            end = start + count
            tokens[at : at + count] = segment.tokens
            where = np.arange(start, end)
            positions[at : at + count] = where
            own = np.asarray(segment.blocks[: -(-end // block_size)], dtype=np.int64)
            blocks[at : at + count] = own[where // block_size]
            # What a block held before must not be read, and 0 times anything finite is 0: clear it when it is begun.
            if end % block_size and (end - 1) // block_size * block_size >= start:
                pool[own[-1]] = 0.0
            if count == 1:
                tiles = start // ATTENTION_TILE + 1
                singles.setdefault(tiles, []).append((at, start, own.tolist()))
            else:
                position = start
                while position < end:
                    stop = min(end, (position // ATTENTION_TILE + 1) * ATTENTION_TILE)
                    spans.append(_span(at + position - start, position, stop, own, block_size))
                    position = stop
            at += count
            if segment.wants_logits:
                last.append(at - 1)
        groups: list[_Group] = []
        for tiles, members in singles.items():
            most = max(1, _GATHER_TOKENS // (tiles * ATTENTION_TILE))
            for first in range(0, len(members), most):
                groups.append(_group(members[first : first + most], tiles, block_size))
        return groups, spans, last

    def _attend(
        self,
        groups: list[_Group],
        spans: list[_Span],
        queries: Array,
        flat: Array,
        row: int,
        out: Array,
        block_size: int,
    ) -> None:
        """Fill `out` (heads * head_dim, columns); each group and each kv head of a span is one piece of work."""
        heads = self.config.kv_heads

        def piece(number: int) -> None:
            if number < len(groups):
                self._attend_group(groups[number], queries, flat, row, out, block_size)
            else:
                at, head = divmod(number - len(groups), heads)
                self._attend_span(spans[at], head, queries, flat, row, out, block_size)

        self.team.run(piece, len(groups) + len(spans) * heads)

    def _attend_group(self, group: _Group, queries: Array, flat: Array, row: int, out: Array, block_size: int) -> None:
        cfg = self.config
        count, blocks = group.table.shape
        length = blocks * block_size
        tiles = length // ATTENTION_TILE
        q = _at_least_two(np.ascontiguousarray(queries[..., group.columns].transpose(3, 0, 1, 2)))
        per_kv = q.shape[2]
        rows = group.table * (2 * cfg.layers) + row
        keys = flat.take(rows, axis=0, mode="clip").reshape(count, blocks, cfg.kv_heads, cfg.head_dim, block_size)
        scores: Array
        if self._block_by_block(block_size, per_kv):
            by_block = np.matmul(q[:, None], keys).transpose(0, 2, 3, 1, 4)
            scores = np.ascontiguousarray(by_block).reshape(count, cfg.kv_heads, per_kv, length)
        else:
            scores = np.matmul(q, keys.transpose(0, 2, 3, 1, 4).reshape(count, cfg.kv_heads, cfg.head_dim, length))
        scores += group.bias[:, None, None]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        values = flat.take(rows + 1, axis=0, mode="clip").reshape(
            count, tiles, ATTENTION_TILE, cfg.kv_heads, cfg.head_dim
        )
        weights = scores.reshape(count, cfg.kv_heads, per_kv, tiles, ATTENTION_TILE)
        parts = np.matmul(weights.transpose(0, 3, 1, 2, 4), values.transpose(0, 1, 3, 2, 4))
        summed = parts[:, 0]
        for tile in range(1, tiles):
            summed = summed + parts[:, tile]
        result = (summed / total)[:, :, : queries.shape[1]]
        out[:, group.columns] = result.reshape(count, -1).T

    def _attend_span(
        self, span: _Span, head: int, queries: Array, flat: Array, row: int, out: Array, block_size: int
    ) -> None:
        cfg = self.config
        length = span.table.size * block_size
        rows = span.table * (2 * cfg.layers) + row
        stored = flat.reshape(flat.shape[0], cfg.kv_heads, cfg.head_dim, block_size)[rows, head]
        keys = stored.transpose(1, 0, 2).reshape(cfg.head_dim, length)
        values = flat.reshape(flat.shape[0], block_size, cfg.kv_heads, cfg.head_dim)[rows + 1, :, head]
        values = values.reshape(length, cfg.head_dim)
        chosen = queries[head, :, :, span.first : span.first + span.count]
        per_kv = chosen.shape[0]
        q = np.ascontiguousarray(chosen.transpose(0, 2, 1)).reshape(per_kv * span.count, cfg.head_dim)
        scores = np.matmul(q, keys)
        shaped = scores.reshape(per_kv, span.count, length)
        shaped += span.bias
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        summed = np.matmul(scores[:, :ATTENTION_TILE], values[:ATTENTION_TILE])
        for tile in range(ATTENTION_TILE, length, ATTENTION_TILE):
            until = tile + ATTENTION_TILE
            summed = summed + np.matmul(scores[:, tile:until], values[tile:until])
        result = (summed / total).reshape(per_kv, span.count, cfg.head_dim).transpose(0, 2, 1)
        size = per_kv * cfg.head_dim
        out[head * size : (head + 1) * size, span.first : span.first + span.count] = result.reshape(size, span.count)


def _columns(rows: int, columns: int) -> Array:
    return np.random.RandomState(7).standard_normal((rows, columns)).astype(np.float32)


def _as_one(parts: list[Array]) -> Array | None:
    """One matrix over parts that follow each other in memory, or None. No copy."""
    first = parts[0]
    address = first.ctypes.data
    for part in parts:
        # Only mapped files: freshly allocated arrays may be neighbours by chance, and are freed one by one.
        if part.ctypes.data != address or part.flags.owndata or part.flags.writeable:
            return None
        address += part.nbytes
    base: Any = first
    while isinstance(base.base, np.ndarray):
        base = base.base
    start = first.ctypes.data - base.ctypes.data
    if address > base.ctypes.data + base.nbytes:
        return None
    whole: Array = base.view(np.uint8)[start : start + sum(part.nbytes for part in parts)].view(np.float32)
    return whole.reshape(-1, first.shape[1])


def _at_least_two(q: Array) -> Array:
    """Pad queries (count, kv_heads, queries, head_dim): a single one would take another kernel."""
    if q.shape[2] > 1:
        return q
    return np.concatenate([q, np.zeros_like(q)], axis=2)


def _padded_table(own: Sequence[int] | Ints, tiles: int, block_size: int) -> Ints:
    """Blocks for whole tiles. What lies beyond the sequence is masked, so any block with finite content will do."""
    table = np.full(tiles * ATTENTION_TILE // block_size, own[0], dtype=np.int64)
    table[: len(own)] = own
    return table


def _mask(hidden: npt.NDArray[np.bool_]) -> Array:
    return np.where(hidden, np.float32(-np.inf), np.float32(0.0)).astype(np.float32)


def _group(members: list[tuple[int, int, Sequence[int]]], tiles: int, block_size: int) -> _Group:
    columns = np.asarray([column for column, _, _ in members], dtype=np.int64)
    positions = np.asarray([position for _, position, _ in members], dtype=np.int64)
    table = np.stack([_padded_table(own, tiles, block_size) for _, _, own in members])
    return _Group(columns, table, _mask(np.arange(tiles * ATTENTION_TILE) > positions[:, None]))


def _span(first: int, start: int, stop: int, own: Ints, block_size: int) -> _Span:
    tiles = (stop - 1) // ATTENTION_TILE + 1
    needed = own[: min(len(own), tiles * ATTENTION_TILE // block_size)]
    bias = _mask(np.arange(tiles * ATTENTION_TILE) > np.arange(start, stop)[:, None])
    return _Span(first, stop - start, _padded_table(needed, tiles, block_size), bias)


def require_context(config: ModelConfig, max_context: int) -> None:
    """Raise EngineError if the model was not made for `max_context` positions."""
    if max_context > config.max_context:
        raise EngineError(
            f"engine.max_context: found {max_context}, wanted at most {config.max_context}, which is what the model's "
            "max_position_embeddings allows; lower engine.max_context"
        )
