"""UCX's protocol tables as UCX 1.19 and 1.21 and later print them, and what is made of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.transfer.transport import Transport, parse_tables, read_transport

OLD = """\
[1.1] [h:1:0]   +----------------------+-------------------------------------------------+------------+
[1.1] [h:1:0]   | d/1 intra-node cfg#0 | remote memory read by ucp_get* into host memory from host    |
[1.1] [h:1:0]   +----------------------+-------------------------------------------------+------------+
[1.1] [h:1:0]   |               0..inf | zero-copy                                       | cma/memory |
[1.1] [h:1:0]   +----------------------+-------------------------------------------------+------------+
[1.1] [h:1:0]        mpool.c:54   UCX  WARN  object was not returned
"""
NEW = """\
[1.1] [h:1 :0]   +--------+--------------------+--------+
[1.1] [h:1 :0]   | d-1 self cfg#0                       |
[1.1] [h:1 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1.1] [h:1 :0]   +--------+--------------------+--------+
[1.1] [h:1 :0]   | Range  |    Description     | Config |
[1.1] [h:1 :0]   +--------+--------------------+--------+
[1.1] [h:1 :0]   | 0..inf | zero-copy          | cma/memory |
[1.1] [h:1 :0]   +--------+--------------------+--------+
[1.1] [h:1 :0]   +--------+--------------------+--------+
[1.1] [h:1 :0]   | d-1 inter-node cfg#1                 |
[1.1] [h:1 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1.1] [h:1 :0]   +--------+--------------------+--------+
[1.1] [h:1 :0]   | Range  |    Description     | Config |
[1.1] [h:1 :0]   +--------+--------------------+--------+
[1.1] [h:1 :0]   |          0 | short              | tcp/lo |
[1.1] [h:1 :0]   | 1..16K | software emulation | tcp/eth0 |
[1.1] [h:1 :0]   | 16385..inf | zero-copy | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1 |
[1.1] [h:1 :0]   +--------+--------------------+--------+
"""


def test_reads_the_one_line_title() -> None:
    assert read_transport(parse_tables(OLD), "d/1", 65536) == Transport("cma", "zero-copy cma/memory")


@pytest.mark.parametrize(
    ("nbytes", "name", "one_sided"), [(0, "tcp", True), (16384, "tcp", False), (1 << 20, "rc_mlx5", True)]
)
def test_reads_the_two_line_title_and_the_range(nbytes: int, name: str, one_sided: bool) -> None:
    found = read_transport(parse_tables(OLD + NEW), "d-1", nbytes)
    assert found is not None
    assert (found.name, found.one_sided) == (name, one_sided)


def test_several_lanes_are_all_named() -> None:
    tables = parse_tables(OLD.replace("cma/memory", "80% on tcp/eth0 and 20% on cma/memory"))
    found = read_transport(tables, "d/1", 1)
    assert found is not None
    assert found.name == "tcp+cma"


def test_another_peer_or_operation_is_not_mixed_up() -> None:
    assert read_transport(parse_tables(OLD + NEW), "d-2", 1) is None
    assert read_transport(parse_tables(OLD.replace("ucp_get", "ucp_put")), "d/1", 1) is None


@given(st.text(alphabet="| .+-0123456789infcfg#getucp_\n\tabK", max_size=400))
def test_any_log_can_be_parsed(text: str) -> None:
    parse_tables(text)
