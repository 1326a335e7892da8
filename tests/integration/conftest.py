"""Fixtures: one etcd and NATS for all tests, a tiny model, a stack per backend, an aggregated worker."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.processes import Coordination, Ports, Stack, find_program

NEEDED_PROGRAMS = ("etcd", "nats-server")
NEEDED_MODULES = ("dynamo", "numpy", "prometheus_client")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in NEEDED_PROGRAMS if find_program(name) is None]
    missing += [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"not found: {', '.join(missing)} (programs are looked for in PDSTACK_TEST_BIN and PATH)"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def ports() -> Ports:
    return Ports()


@pytest.fixture(scope="session")
def coordination(tmp_path_factory: pytest.TempPathFactory, ports: Ports) -> Iterator[Coordination]:
    coordination = Coordination(tmp_path_factory.mktemp("coordination"), ports)
    coordination.prepare()
    coordination.start()
    yield coordination
    coordination.stop()


@pytest.fixture
def own_coordination(tmp_path: Path, ports: Ports) -> Iterator[Coordination]:
    """An etcd and a NATS server for one test, not started yet."""
    coordination = Coordination(tmp_path / "coordination", ports)
    coordination.prepare()
    yield coordination
    coordination.stop()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pdstack.models.tiny import write_tiny_model

    path = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(path)
    return path


MakeStack = Callable[..., Stack]


@pytest.fixture
def make_stack(
    tmp_path: Path, ports: Ports, coordination: Coordination, model_path: Path, request: pytest.FixtureRequest
) -> Iterator[MakeStack]:
    """Makes stacks that end with the test."""
    made: list[Stack] = []

    def make(backend: str = "ucx", coordination: Coordination = coordination) -> Stack:
        name = "".join(c if c.isalnum() else "_" for c in request.node.name.lower())[:40]
        namespace = f"{name}_{len(made)}"
        made.append(Stack(tmp_path / namespace, ports, coordination, namespace, model_path, backend))
        return made[-1]

    yield make
    for stack in made:
        stack.stop()


def shared_stack(
    factory: pytest.TempPathFactory, ports: Ports, coordination: Coordination, model_path: Path, name: str, backend: str
) -> Stack:
    return Stack(factory.mktemp(name), ports, coordination, name, model_path, backend)


@pytest.fixture(scope="session", params=["ucx", "nixl"])
def stack(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    ports: Ports,
    coordination: Coordination,
    model_path: Path,
) -> Iterator[Stack]:
    """A frontend, a prefill and a decode worker: once per backend, shared by the tests that leave it as it is."""
    backend = request.param
    stack = shared_stack(tmp_path_factory, ports, coordination, model_path, f"shared_{backend}", backend)
    stack.start_frontend("--enforce-disagg")
    stack.start_worker("prefill-0", "prefill", wait=False)
    stack.start_worker("decode-0", "decode")
    stack.wait_serving()
    yield stack
    stack.stop()


@pytest.fixture(scope="session")
def aggregated(
    tmp_path_factory: pytest.TempPathFactory, ports: Ports, coordination: Coordination, model_path: Path
) -> Iterator[Stack]:
    """A frontend and one worker that does everything itself: what disaggregated answers are compared with."""
    stack = shared_stack(tmp_path_factory, ports, coordination, model_path, "shared_aggregated", "ucx")
    stack.start_frontend()
    stack.start_worker("aggregated-0", "aggregated")
    stack.wait_serving()
    yield stack
    stack.stop()
