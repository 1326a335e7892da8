"""`LLM`: arguments in, requests served, by one thread with an event loop of its own (TensorRT-LLM's executor)."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

from torch.cuda import device_count

from pdstack import engine as reference
from pdstack.models.hf_config import ModelConfig
from pdstack.transfer import Role, Ticket, TransferAgent, TransferError
from tensorrt_llm._lab import transceiver
from tensorrt_llm.executor.result import GenerationResult
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi.disagg_utils import DisaggregatedParams
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
from tensorrt_llm.sampling_params import SamplingParams

LONGEST_CONTEXT = 2048
BLOCKS = 1024
REFUSALS = (reference.ContextTooLong, reference.Overloaded, TransferError, ValueError)


def log(text: str) -> None:
    """Write a line as TensorRT-LLM's C++ part does."""
    print(f"[TensorRT-LLM][INFO] {text}", flush=True)


def role() -> str:
    """Return prefill, decode or prefill_and_decode: what Dynamo's command line says, for LLM itself is not told."""
    flag = "--disaggregation-mode"
    for at, word in enumerate(sys.argv):
        if word == flag and at + 1 < len(sys.argv):
            return sys.argv[at + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return "prefill_and_decode"


class LLM:
    """The engine. Raises for arguments that TensorRT-LLM refuses, and for what the container lacks."""

    def __init__(self, model: str, **arguments: Any) -> None:
        self.args = TorchLlmArgs(model=model, **arguments)
        self._check_devices()
        self.role = role()
        self._numbers = itertools.count(1)
        self._events: deque[dict[str, Any]] = deque()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="trtllm-executor", daemon=True).start()
        self._agent: TransferAgent | None = None
        self._tasks: set[Any] = set()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def _check_devices(self) -> None:
        wanted, found = self.args.tensor_parallel_size * self.args.pipeline_parallel_size, device_count()
        if wanted > found:
            raise RuntimeError(f"world size {wanted} (tensor x pipeline parallel) needs {wanted} GPUs, found {found}")
        if not Path(self.args.model).is_dir():
            raise FileNotFoundError(f"{self.args.model}: no such model directory, and the lab has no model hub")

    async def _start(self) -> None:
        cache = self.args.kv_cache_config
        longest = min(LONGEST_CONTEXT, ModelConfig.load(Path(self.args.model)).max_context)
        block = cache.tokens_per_block
        config = reference.EngineConfig(
            block_size=block,
            kv_blocks=(cache.max_tokens or BLOCKS * 16) // block,
            max_context=min(self.args.max_seq_len or longest, longest),
            max_batch=min(self.args.max_batch_size or 32, 32),
            prefill_chunk=128,
            threads=2,
            # A prefill-only worker that reuses blocks needs no more than this of TensorRT-LLM's reuse tree. Its
            # transceiver moves all blocks of a prompt, also those that decode has.
            prefix_cache=cache.enable_block_reuse and self.role != "decode",
        )
        self.engine = reference.Engine.load(Path(self.args.model), config)
        if cache.event_buffer_max_size:
            self.engine.events = self
            self._events.append(self._event({"type": "created", "num_blocks_per_cache_level": [config.kv_blocks, 0]}))
        self.engine.start()
        wanted = self.args.cache_transceiver_config
        if wanted is None or wanted.backend is None:
            log("CacheTransceiver is disabled")
        elif self.role in ("prefill", "decode"):
            self._agent = await transceiver.create(Role(self.role), self.engine, wanted, log)

    # Requests

    def generate_async(
        self,
        inputs: Sequence[int],
        sampling_params: SamplingParams,
        disaggregated_params: DisaggregatedParams | None = None,
        streaming: bool = False,
    ) -> GenerationResult:
        """Serve one request. `streaming` False is only used for prefill, which gives one token anyway."""
        number = next(self._numbers)
        key = str(number)
        result = GenerationResult(
            number, asyncio.get_running_loop(), lambda: self._loop.call_soon_threadsafe(self.engine.cancel, key)
        )
        request = reference.Request(key, [int(token) for token in inputs], self._sampling(sampling_params))
        kind = disaggregated_params.request_type if disaggregated_params else None
        work: Coroutine[Any, Any, None]
        if kind == "context_only":
            work = self._prefill(request, result)
        elif kind == "generation_only":
            assert disaggregated_params is not None
            work = self._decode(request, result, disaggregated_params)
        else:
            work = self._generate(request, result)
        task = asyncio.run_coroutine_threadsafe(self._guarded(work, result), self._loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return result

    @staticmethod
    def _sampling(wanted: SamplingParams) -> reference.SamplingParams:
        return reference.SamplingParams(
            temperature=wanted.temperature or 0.0,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            seed=wanted.seed,
            max_tokens=wanted.max_tokens,
            min_tokens=wanted.min_tokens,
            ignore_eos=wanted.ignore_eos,
        )

    async def _guarded(self, work: Coroutine[Any, Any, None], result: GenerationResult) -> None:
        try:
            await work
        except reference.RequestCancelled:
            result.put(([], "cancelled", None))
        except REFUSALS as error:
            result.put(RequestError(str(error)))
        except Exception as error:
            result.put(error)
        transceiver.forward_ucx_log()

    def _transceiver(self) -> TransferAgent:
        if self._agent is None:
            raise RequestError("cache_transceiver is disabled, please set the cache_transceiver_config:backend in YAML")
        return self._agent

    async def _prefill(self, request: reference.Request, result: GenerationResult) -> None:
        agent = self._transceiver()
        transceiver.check_buffer(len(request.token_ids), self.args.cache_transceiver_config)
        began = time.monotonic()
        found = await self.engine.prefill(request)
        ticket = agent.export(
            request.request_id, found.blocks, found.tokens, found.first_token, lambda key, _: self.engine.release(key)
        )
        parameters = DisaggregatedParams(
            request_type="context_only",
            first_gen_tokens=[found.first_token],
            ctx_request_id=result.request_id,
            opaque_state=json.dumps(ticket.to_wire()).encode(),
        )
        self._measure(result, began, began, found.finish_reason or "length")
        result.put(([found.first_token], found.finish_reason or "length", parameters))

    async def _decode(self, request: reference.Request, result: GenerationResult, given: DisaggregatedParams) -> None:
        agent = self._transceiver()
        ticket = Ticket.from_wire(json.loads(given.opaque_state or b"null"))
        transceiver.check_buffer(len(request.token_ids), self.args.cache_transceiver_config)
        began = time.monotonic()
        try:
            blocks = (await self.engine.reserve(request)).blocks
        except BaseException:
            self.engine.unreserve(request.request_id)
            await agent.discard(ticket)
            raise
        try:
            report = await agent.fetch(ticket, blocks)
        except TransferError as error:
            self.engine.quarantine(request.request_id)
            await error.settled()
            self.engine.unreserve(request.request_id)
            raise
        await self._stream(self.engine.decode(request, report.first_token), result, began)

    async def _generate(self, request: reference.Request, result: GenerationResult) -> None:
        await self._stream(self.engine.generate(request), result, time.monotonic())

    async def _stream(self, steps: AsyncIterator[Any], result: GenerationResult, began: float) -> None:
        first = 0.0
        async for step in steps:
            first = first or time.monotonic()
            if step.finish_reason:
                self._measure(result, began, first, step.finish_reason)
            result.put((step.token_ids, step.finish_reason, None))

    @staticmethod
    def _measure(result: GenerationResult, began: float, first: float, reason: str) -> None:
        now = time.monotonic()
        result.metrics_dict = {"finished_reason": reason, "e2e": now - began, "ttft": (first or now) - began}

    # What the publishers ask for

    def stored(self, token_ids: Sequence[int], block_hashes: Sequence[int], parent_hash: int | None) -> None:
        """Take note of new blocks in the reuse tree."""
        size = self.args.kv_cache_config.tokens_per_block
        blocks = [
            {"block_hash": each, "tokens": [{"token_id": int(t)} for t in token_ids[at * size : (at + 1) * size]]}
            for at, each in enumerate(block_hashes)
        ]
        self._events.append(self._event({"type": "stored", "parent_hash": parent_hash, "blocks": blocks}))

    def removed(self, block_hashes: Sequence[int]) -> None:
        """Take note of blocks that are gone."""
        self._events.append(self._event({"type": "removed", "block_hashes": list(block_hashes)}))

    def _event(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"event_id": next(self._numbers), "data": data, "window_size": LONGEST_CONTEXT}

    async def get_kv_cache_events_async(self, timeout: float | None = None) -> AsyncIterator[dict[str, Any]]:
        """Yield what has happened to the reuse tree."""
        if not self._events:
            await asyncio.sleep(min(timeout or 0.2, 0.2))
        while self._events:
            yield self._events.popleft()

    async def get_stats_async(self, timeout: float | None = None) -> AsyncIterator[dict[str, Any]]:
        """Yield one moment of the engine, once a second."""
        await asyncio.sleep(min(timeout or 1.0, 1.0))
        stats = self.engine.stats()
        yield {
            "numActiveRequests": stats.prefilling + stats.decoding,
            "maxNumActiveRequests": stats.max_batch,
            "numQueuedRequests": stats.waiting,
            "inflightBatchingStats": {"numPausedRequests": 0},
            "kvCacheStats": {
                "usedNumBlocks": stats.used_blocks,
                "maxNumBlocks": stats.total_blocks,
                "freeNumBlocks": stats.free_blocks,
                "reusedBlocks": stats.cached_blocks,
                "allocTotalBlocks": stats.used_blocks,
                "allocNewBlocks": 0,
                "cacheHitRate": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
            },
        }

    def shutdown(self) -> None:
        """Stop serving."""
        if self._agent is not None:
            asyncio.run_coroutine_threadsafe(self._agent.close(), self._loop).result(10)
        self.engine.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        sys.stdout.flush()
        sys.stderr.flush()
        # UCX's destructors race with the interpreter's end; Dynamo has deregistered by now and nothing else is open.
        threading.Timer(1.0, os._exit, (0,)).start()
