"""The worker's side of Dynamo: runtime, registration, publishers, shutdown.

Only this module and kv_events import `dynamo`, and only after the environment that its runtime reads has been set.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pdstack.worker.again import AskAgainFailed
from pdstack.worker.config import WorkerConfig
from pdstack.worker.handlers import Handler

log = logging.getLogger(__name__)

# NVIDIA's own component names. The frontend goes by the model type, people go by these.
COMPONENTS = {"prefill": "prefill", "decode": "backend", "aggregated": "backend"}
ENDPOINT = "generate"
REGISTRATION_TIMEOUT_S = 15.0
REGISTRATION_POLL_S = 0.02
# A prefill worker that was killed is back after 1 to 2 s and the loading of its model, if a container restarts it.
OTHER_PREFILL_S = 30.0
# So long only others are asked than the one that was lost. It may have been frozen, and be well again.
OTHERS_ONLY_S = 10.0
OTHER_PREFILL_POLL_S = 0.1
# Beyond the wait for blocks, which is prefill's own to bound: a worker that is frozen never answers.
ANSWER_S = 15.0


class RuntimeFailed(Exception):
    """Dynamo's runtime could not be created or used; the text is what it said."""


def set_environment(etcd_endpoints: Sequence[str], nats_server: str) -> None:
    """Set what Dynamo's runtime reads from the environment; call before anything of `dynamo` is imported."""
    os.environ["ETCD_ENDPOINTS"] = ",".join(etcd_endpoints)
    os.environ["NATS_SERVER"] = nats_server
    # With 1 the text of every error sent to HTTP clients carries 15 kB of stack.
    os.environ.setdefault("RUST_BACKTRACE", "0")
    os.environ.setdefault("DYN_SDK_DISABLE_ANSI_LOGGING", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Link:
    """One registration of this process with Dynamo: from creating the runtime until its lease is given back."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._runtime: Any = None
        self._component: Any = None
        self._endpoint: Any = None
        self._client: Any = None
        self._prefill: Any = None
        self._metrics_publisher: Any = None
        self._last_metrics: tuple[int, int, int] | None = None

    async def open(self) -> None:
        """Connect to etcd and NATS and create the component. Raises RuntimeFailed."""
        config = self._config
        try:
            from dynamo.llm import WorkerMetricsPublisher
            from dynamo.runtime import DistributedRuntime

            self._runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", False)
            self._component = self._runtime.namespace(config.namespace).component(COMPONENTS[config.role])
            await self._component.create_service()
            self._endpoint = self._component.endpoint(ENDPOINT)
            if config.role == "decode":
                prefill = self._runtime.namespace(config.namespace).component(COMPONENTS["prefill"])
                self._prefill = await prefill.endpoint(ENDPOINT).client()
            self._metrics_publisher = WorkerMetricsPublisher()
            created = self._metrics_publisher.create_endpoint(self._component)
            if inspect.isawaitable(created):
                await created
        except BaseException as error:
            raise failure(error, "create the Dynamo runtime") from None

    @property
    def component(self) -> Any:
        """Dynamo's component, for the KV event publisher."""
        return self._component

    @property
    def worker_id(self) -> int:
        """Dynamo's number of this instance (the id of its lease)."""
        return int(self._endpoint.connection_id())

    async def register(self) -> None:
        """Publish the model card, so that frontends list the model. Raises RuntimeFailed."""
        config = self._config
        try:
            from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, register_llm

            details = ModelRuntimeConfig()
            details.total_kv_blocks = config.engine.kv_blocks
            details.max_num_seqs = config.engine.max_batch
            details.max_num_batched_tokens = config.engine.max_context
            prefill = config.role == "prefill"
            await register_llm(
                ModelInput.Tokens,
                ModelType.Prefill if prefill else ModelType.Chat | ModelType.Completions,
                self._endpoint,
                config.model_path,
                config.model_name,
                context_length=config.engine.max_context,
                kv_cache_block_size=config.engine.block_size,
                # Dynamo refuses another value than 0 for prefill: the request moves with its decode worker.
                migration_limit=0 if prefill else config.migration_limit,
                runtime_config=details,
            )
        except BaseException as error:
            raise failure(error, "register the model") from None

    async def serve(self, handler: Handler) -> None:
        """Serve requests until shutdown() is called or the lease is lost. Raises RuntimeFailed."""
        try:
            # Draining is done by counting requests ourselves: graceful_shutdown=True returns at once all the same.
            await self._endpoint.serve_endpoint(handler.generate, graceful_shutdown=True)
        except BaseException as error:
            raise failure(error, "serve the endpoint") from None

    async def wait_registered(self) -> None:
        """Wait until discovery lists this instance. Raises RuntimeFailed after REGISTRATION_TIMEOUT_S."""
        self._client = await self._endpoint.client()
        try:
            async with asyncio.timeout(REGISTRATION_TIMEOUT_S):
                # Dynamo has no event for this.
                while not self.listed():  # noqa: ASYNC110
                    await asyncio.sleep(REGISTRATION_POLL_S)
        except TimeoutError:
            raise RuntimeFailed(
                f"instance {self.worker_id:x} is not listed in etcd after {REGISTRATION_TIMEOUT_S:g} s"
            ) from None

    def listed(self) -> bool:
        """Say whether discovery lists this instance now."""
        return self._client is not None and self.worker_id in self._client.instance_ids()

    async def ask_prefill(
        self, request: Mapping[str, Any], request_id: str, avoid: Collection[int]
    ) -> Mapping[str, Any]:
        """Decode only: see :class:`pdstack.worker.again.Prefill`."""
        from dynamo.runtime import Context

        loop = asyncio.get_running_loop()
        began = loop.time()
        problem = "none is registered"
        tried: set[int] = set()
        while True:
            waited = loop.time() - began
            left = set(self._prefill.instance_ids()) - tried - (set(avoid) if waited < OTHERS_ONLY_S else set())
            if not left and waited >= OTHER_PREFILL_S:
                raise AskAgainFailed(f"the KV of the prompt is lost and no prefill worker computes it again: {problem}")
            if not left:
                await asyncio.sleep(OTHER_PREFILL_POLL_S)
                continue
            instance = random.choice(sorted(left))  # noqa: S311  # spreads load, keeps no secret
            tried.add(instance)
            try:
                async with asyncio.timeout(self._config.engine.queue_timeout_s + ANSWER_S):
                    context = Context(request_id)
                    stream = await self._prefill.direct(dict(request), instance, annotated=False, context=context)
                    async for item in stream:
                        return dict(item)
                problem = f"{instance:x} gave nothing"
            except TimeoutError:
                problem = f"{instance:x} did not answer"
            except Exception as error:
                # Whatever Dynamo raises: what counts is that this one did not take the prompt.
                problem = f"{instance:x}: {error}"
            log.warning("request %s: prefill worker %s", request_id, problem)

    def publish_metrics(self, active: int, waiting: int, used_blocks: int) -> None:
        """Tell the router how busy this worker is; what has not changed is not sent again."""
        state = (active, waiting, used_blocks)
        if state == self._last_metrics:
            return
        from dynamo.llm import ForwardPassMetrics, KvStats, WorkerStats

        total = self._config.engine.kv_blocks
        self._metrics_publisher.publish(
            ForwardPassMetrics(
                WorkerStats(active, self._config.engine.max_batch, waiting, 0),
                KvStats(used_blocks, total, used_blocks / total, 0.0),
                None,
            )
        )
        self._last_metrics = state

    def shutdown(self) -> None:
        """Deregister: the router sends nothing new from now on; requests being served go on."""
        if self._runtime is not None:
            self._runtime.shutdown()


def failure(error: BaseException, purpose: str) -> BaseException:
    """Turn an error of Dynamo into RuntimeFailed; let exits, interrupts and cancellations through as they are.

    A panic of the Rust part arrives as pyo3_runtime.PanicException, which is a BaseException and not an Exception.
    """
    if isinstance(error, SystemExit | KeyboardInterrupt | asyncio.CancelledError | GeneratorExit):
        return error
    return RuntimeFailed(f"cannot {purpose}: {type(error).__name__}: {error}")
