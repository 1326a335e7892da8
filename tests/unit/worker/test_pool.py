"""Where the worker's KV pool lies, for each role and path."""

from __future__ import annotations

import numpy as np
import pytest

from pdstack.transfer.errors import BackendUnavailable
from pdstack.transfer.paths.pools import shared_pool
from pdstack.worker.config import EngineSection, Listen, TransferSection, WorkerConfig
from pdstack.worker.pool import pool_maker


def config(role: str, path: str | None) -> WorkerConfig:
    listen = Listen("127.0.0.1", 0)
    transfer = None if path is None else TransferSection("ucx", "/key", listen, "127.0.0.1", path=path)
    return WorkerConfig(
        name="w", role=role, namespace="n", model_name="m", model_path="/m", etcd_endpoints=["http://a:1"],
        nats_server="nats://a:1", status=listen, engine=EngineSection(), transfer=transfer,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("role", "path", "shared"),
    [
        ("aggregated", None, False),
        ("prefill", "backend", False),
        ("prefill", "cma", False),
        ("prefill", "stream", False),
        ("prefill", "shared", True),
        ("prefill", "auto", True),
        ("decode", "shared", False),
    ],
)
def test_only_prefills_pool_is_shared_and_only_where_the_path_wants_it(
    role: str, path: str | None, shared: bool
) -> None:
    array = pool_maker(config(role, path))(3, 2, 16, 2, 8)
    assert (array.shape, array.dtype, bool(array.any())) == ((3, 2, 2, 16, 2, 8), np.dtype("float32"), False)
    if shared:
        assert shared_pool(array).nbytes == array.nbytes
    else:
        with pytest.raises(BackendUnavailable):
            shared_pool(array)
