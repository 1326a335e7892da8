"""The life of a worker process: load, connect, register, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from pdstack.engine import Engine, EngineConfig
from pdstack.transfer import KVLayout, Role, TransferAgent, TransferConfig, TransferMetrics
from pdstack.worker import coordination, predecessor
from pdstack.worker.again import AskAgainFailed
from pdstack.worker.config import WorkerConfig
from pdstack.worker.dynamo_link import Link, RuntimeFailed
from pdstack.worker.finished import FinishedRequests
from pdstack.worker.handlers import AggregatedHandler, DecodeHandler, Handler, PrefillHandler
from pdstack.worker.jobs import Jobs
from pdstack.worker.kv_events import KvEvents
from pdstack.worker.metrics import EngineCollector, WorkerMetrics
from pdstack.worker.pool import pool_maker
from pdstack.worker.status import Answer, StatusServer, json_answer

log = logging.getLogger(__name__)

EXIT_STOPPED = 0
EXIT_LOST = 1
METRICS_PERIOD_S = 1.0
# Of creating the runtime and registering, with etcd and NATS known to answer. A fresh process may do better.
MOST_ATTEMPTS = 5
# A step is a token for everybody and at most one chunk of a prompt: far below a second on any machine that is of use.
LONGEST_STEP_S = 120.0
# Dynamo revokes the lease in the background after shutdown(); a process that leaves earlier stays listed for 10 s.
LINGER_S = 0.5


class Worker:
    """One worker. `run()` returns the exit code of the process."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.stage = "starting"
        self.stop = asyncio.Event()
        self.registry = CollectorRegistry()
        self.finished = FinishedRequests()
        self.jobs = Jobs(config.role, WorkerMetrics(self.registry), self.finished)
        self.status = StatusServer(
            {
                "health": self._health,
                "metrics": self._metrics,
                "transfer": self._transfer,
                "audit": self._audit,
                "requests": self._request,
            }
        )
        self.engine: Engine | None = None
        self.agent: TransferAgent | None = None
        self.link: Link | None = None
        self.kv_events: KvEvents | None = None
        self.registrations_lost = Counter(
            "pdstack_registrations_lost", "Times that Dynamo ended the registration by itself", registry=self.registry
        )

    async def run(self) -> int:
        """Run until a signal arrives (EXIT_STOPPED) or Dynamo cannot be used any more (EXIT_LOST)."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        await self.status.start(self.config.status.host, self.config.status.port)
        try:
            self._stage("loading the model")
            self.engine = await self._load_engine()
            self.agent = await self._create_agent(self.engine)
            while await self._unless_stopped(self._connect()):
                await self._serve()
                if self.stop.is_set():
                    break
                if not self.engine.alive:
                    log.error("the engine's thread has ended, so nothing can be served: leaving to be started anew")
                    return EXIT_LOST
                # The lease was lost: etcd was away for some seconds. Model, cache, transfers and the streams in flight
                # are as good as before, so a new registration is all that is needed.
                self.registrations_lost.inc()
                log.error("Dynamo ended the registration without being asked: the lease was lost (is etcd well?)")
            else:
                # The signal came while there was no registration; streams of an earlier one may still run.
                self._stage("draining")
                await self._drain()
            return EXIT_STOPPED
        except RuntimeFailed as error:
            log.error("giving up after %d attempts: %s", MOST_ATTEMPTS, error)
            return EXIT_LOST
        finally:
            await self._leave()

    async def _serve(self) -> None:
        """Serve until a signal arrives or the registration ends; in the first case, drain."""
        link = self.link
        assert link is not None
        serving = asyncio.create_task(link.serve(self._handler()))
        helpers = [asyncio.create_task(self._publish_metrics(link)), asyncio.create_task(self._announce(link))]
        stopped = asyncio.create_task(self.stop.wait())
        ended = asyncio.create_task(self._engine_ended())
        try:
            await asyncio.wait({serving, stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.link = None
            for task in (*helpers, stopped, ended):
                task.cancel()
            link.shutdown()
        if self.stop.is_set():
            self._stage("draining")
            await self._drain()
            serving.cancel()
        else:
            self._stage("the registration was lost")
        await asyncio.gather(serving, *helpers, return_exceptions=True)

    async def _engine_ended(self) -> None:
        # The engine's thread can end without telling anybody, so it has to be asked.
        while self.engine is not None and self.engine.alive:  # noqa: ASYNC110
            await asyncio.sleep(1.0)

    def _stage(self, text: str) -> None:
        self.stage = text
        log.info("%s", text)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do `work` unless a signal comes first; say whether it was done."""
        doing = asyncio.create_task(work)
        stopped = asyncio.create_task(self.stop.wait())
        await asyncio.wait({doing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not doing.done():
            doing.cancel()
            with suppress(asyncio.CancelledError):
                await doing
            return False
        doing.result()
        return True

    async def _load_engine(self) -> Engine:
        settings = EngineConfig(**asdict(self.config.engine))
        engine = await asyncio.to_thread(Engine.load, Path(self.config.model_path), settings, pool_maker(self.config))
        engine.start()
        if self.config.role == "prefill" and self.config.engine.prefix_cache:
            self.kv_events = KvEvents(self.config.engine.block_size)
            engine.events = self.kv_events
        self.registry.register(EngineCollector(lambda: asdict(engine.stats())))
        return engine

    async def _create_agent(self, engine: Engine) -> TransferAgent | None:
        settings = self.config.transfer
        if settings is None:
            return None
        return await TransferAgent.create(
            Role(self.config.role),
            name=self.config.name,
            audience=self.config.audience,
            layout=KVLayout(**engine.layout_fields),
            pool=engine.pool.array,
            config=TransferConfig.from_mapping(asdict(settings)),
            metrics=TransferMetrics(self.registry),
            generations=engine.generations,
        )

    async def _connect(self) -> None:
        """Wait for etcd and NATS, create the runtime, register the model. Raises RuntimeFailed after MOST_ATTEMPTS."""
        for attempt in range(1, MOST_ATTEMPTS + 1):
            await coordination.until(lambda: coordination.check_etcd(self.config.etcd_endpoints), self._waiting)
            await coordination.until(lambda: coordination.check_nats(self.config.nats_server), self._waiting)
            self._stage("registering")
            link = Link(self.config)
            try:
                await link.open()
                await predecessor.replace(
                    self.config.etcd_endpoints, self.config.namespace, self.config.name, link.worker_id
                )
                if self.kv_events is not None:
                    self.kv_events.attach(link.component, link.worker_id)
                await link.register()
            except RuntimeFailed as error:
                link.shutdown()
                if attempt == MOST_ATTEMPTS:
                    raise
                self._waiting(str(error))
                await asyncio.sleep(coordination.LONGEST_PAUSE_S)
            except BaseException:
                link.shutdown()  # a signal came: the lease must not outlive this process
                raise
            else:
                self.link = link
                return

    def _waiting(self, reason: str) -> None:
        if self.stage != reason:
            self._stage(reason)

    def _handler(self) -> Handler:
        assert self.engine is not None
        limits = (self.config.engine.max_context, self.config.engine.default_max_tokens)
        if self.agent is None:
            return AggregatedHandler(self.engine, self.jobs, *limits)
        if self.config.role == "prefill":
            return PrefillHandler(self.engine, self.agent, self.jobs, *limits, self._instance)
        return DecodeHandler(
            self.engine, self.agent, self.jobs, *limits, prefill=self, attempts=self.config.migration_limit
        )

    def _instance(self) -> int | None:
        return self.link.worker_id if self.link is not None else None

    async def ask(self, request: Mapping[str, Any], request_id: str, avoid: Collection[int]) -> Mapping[str, Any]:
        """Ask a prefill worker: see :class:`pdstack.worker.again.Prefill`. A request outlives a registration."""
        if self.link is None:
            raise AskAgainFailed("the KV of the prompt is lost, and this worker is not registered to ask prefill again")
        return await self.link.ask_prefill(request, request_id, avoid)

    async def _announce(self, link: Link) -> None:
        try:
            await link.wait_registered()
        except RuntimeFailed as error:
            self._stage(str(error))
            link.shutdown()  # ends serve(), and with it this registration
        else:
            self._stage("serving")

    async def _publish_metrics(self, link: Link) -> None:
        assert self.engine is not None
        while True:
            stats = self.engine.stats()
            link.publish_metrics(stats.prefilling + stats.decoding, stats.waiting, stats.used_blocks)
            await asyncio.sleep(METRICS_PERIOD_S)

    async def _drain(self) -> None:
        """Let the streams in flight end, and what was exported be fetched, for at most drain_timeout_s."""
        log.info("draining: %d requests in flight", self.jobs.in_flight)
        limit = self.config.drain_timeout_s
        deadline = time.monotonic() + limit
        try:
            async with asyncio.timeout(limit):
                await self.jobs.wait_idle()
        except TimeoutError:
            log.error("after %g s %d requests are still in flight: cut", limit, self.jobs.in_flight)
        exporter = self.agent if self.config.role == "prefill" else None
        if exporter is not None and not await exporter.drain(max(0.0, deadline - time.monotonic())):
            log.error("after %g s decode workers have not fetched all that was exported: cut", limit)
        await asyncio.sleep(LINGER_S)

    async def _leave(self) -> None:
        self.jobs.abandon()
        await self.status.close()
        if self.agent is not None:
            await self.agent.close()
        if self.engine is not None:
            self.engine.stop()

    def problems(self) -> list[str]:
        """Say why this worker cannot serve now; empty if it can."""
        found = []
        if self.stage != "serving":
            found.append(self.stage)
        if self.engine is not None and not self.engine.alive:
            found.append("the engine's thread has ended")
        if self.engine is not None and (seconds := self.engine.stats().step_running_s) > LONGEST_STEP_S:
            found.append(f"one step of the engine has been running for {seconds:.0f} s")
        if self.link is not None and self.stage == "serving" and not self.link.listed():
            found.append("etcd does not list this instance")
        return found

    def _health(self, _: str) -> Answer:
        problems = self.problems()
        body = {
            "status": "ready" if not problems else "not ready",
            "problems": problems,
            "name": self.config.name,
            "role": self.config.role,
            "model": self.config.model_name,
            "in_flight": self.jobs.in_flight,
        }
        return json_answer(503 if problems else 200, body)

    def _metrics(self, _: str) -> Answer:
        return Answer(200, generate_latest(self.registry), CONTENT_TYPE_LATEST)

    def _transfer(self, _: str) -> Answer:
        if self.agent is None:
            return json_answer(404, {"error": "this worker has no transfer agent (yet)"})
        return json_answer(200, self.agent.stats())

    def _audit(self, _: str) -> Answer:
        if self.agent is None:
            return json_answer(404, {"error": "this worker has no transfer agent (yet)"})
        return json_answer(200, self.agent.audit.recent())

    def _request(self, request_id: str) -> Answer:
        record = self.finished.get(request_id)
        if record is None:
            return json_answer(404, {"error": "no such request among the last finished ones"})
        return json_answer(200, record)
