from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdstack.engine import Engine, EngineConfig
from pdstack.models.tiny import write_tiny_model

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_engine(tiny: Path) -> Iterator[MakeEngine]:
    """Makes running engines on the tiny model; they end with the test."""
    made: list[Engine] = []

    def make(**settings: object) -> Engine:
        engine = Engine.load(tiny, EngineConfig.from_dict({"threads": 1, "kv_blocks": 256, **settings}))
        engine.start()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop()
