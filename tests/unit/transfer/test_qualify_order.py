"""The order of the paths: the usual one, unless another is clearly faster."""

from __future__ import annotations

import itertools

import pytest

from pdstack.transfer.config import TransferConfig
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.paths.base import GPU_PATHS
from pdstack.transfer.qualify.order import USUAL, order, unusual


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({"stream": 1.0, "shared": 1.0, "backend": 1.0, "cma": 1.0}, USUAL),
        ({"shared": 1.0, "cma": 0.95}, ("shared", "cma")),
        ({"shared": 1.0, "cma": 0.9}, ("cma", "shared")),
        ({"shared": 2.0, "cma": 1.0, "backend": 0.5, "stream": 3.0}, ("backend", "cma", "shared", "stream")),
        ({"cma": 1.0, "stream": 5.0}, ("cma", "stream")),
        ({"backend": 3.0, "stream": 1.0}, ("stream", "backend")),
        ({"staged": 9.0, "cuda_ipc": 1.0}, ("cuda_ipc", "staged")),
        ({}, ()),
    ],
)
def test_order(seconds: dict[str, float], wanted: tuple[str, ...]) -> None:
    assert order(seconds) == wanted
    assert unusual(wanted) is (list(wanted) != [path for path in (*USUAL, *GPU_PATHS) if path in wanted])


def test_noise_below_a_tenth_changes_nothing() -> None:
    for times in itertools.product((1.0, 1.04, 1.09), repeat=len(USUAL)):
        assert order(dict(zip(USUAL, times, strict=True))) == USUAL


def test_an_agent_takes_what_comes_out() -> None:
    TransferConfig(ClusterKey(b"k" * 32), path="auto", order={"prefill-0": order({"stream": 1.0, "backend": 2.0})})
