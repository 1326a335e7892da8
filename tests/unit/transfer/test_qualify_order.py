"""The order of the paths: the usual one, unless another is clearly faster."""

from __future__ import annotations

import itertools

import pytest

from pdstack.transfer.config import TransferConfig
from pdstack.transfer.keys import ClusterKey
from pdstack.transfer.paths.base import GPU_PATHS, ORDER
from pdstack.transfer.qualify.measure import Spread
from pdstack.transfer.qualify.order import order, unusual


def steady(seconds: dict[str, float]) -> dict[str, Spread]:
    """Times that hardly differ from round to round."""
    return {path: Spread(value, value * 0.999, value * 1.001) for path, value in seconds.items()}


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({"stream": 1.0, "shared": 1.0, "backend": 1.0, "cma": 1.0}, ORDER),
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
    assert order(steady(seconds)) == wanted
    assert unusual(wanted) is (list(wanted) != [path for path in (*ORDER, *GPU_PATHS) if path in wanted])


def test_noise_below_a_tenth_changes_nothing() -> None:
    for times in itertools.product((1.0, 1.04, 1.09), repeat=len(ORDER)):
        assert order(steady(dict(zip(ORDER, times, strict=True)))) == ORDER


def test_a_difference_within_what_the_rounds_differ_changes_nothing() -> None:
    shared, cma = Spread(1.0, 0.85, 1.4), Spread(0.8, 0.7, 0.9)
    assert order({"shared": shared, "cma": cma}) == ("shared", "cma")
    assert order({"shared": shared, "cma": Spread(0.8, 0.7, 0.84)}) == ("cma", "shared")


def test_an_agent_takes_what_comes_out() -> None:
    TransferConfig(
        ClusterKey(b"k" * 32), path="auto", order={"prefill-0": order(steady({"stream": 1.0, "backend": 2.0}))}
    )
