"""Tickets: what is signed comes back, and nothing else passes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.transfer import ClusterKey, Ticket, TicketError
from pdstack.transfer.ticket import issue, verify

KEY = ClusterKey(b"k" * 32)
OTHER = ClusterKey(b"o" * 32)
AUDIENCE, LAYOUT = "ns/model", "f" * 64

text = st.text(st.characters(codec="utf-8"), max_size=60)
whole = st.integers(0, 2**53 - 1)
contents = st.fixed_dictionaries(
    {
        "request_id": text,
        "worker": text,
        "incarnation": text,
        "host": text,
        "port": whole,
        "backend": text,
        "blocks": st.lists(whole, min_size=1, max_size=40).map(tuple),
        "tokens": whole,
    }
).map(lambda values: {**values, "generations": values["blocks"][::-1]})
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)


def make(values: dict[str, Any], key: ClusterKey = KEY) -> Ticket:
    return issue(key, ttl_s=60.0, audience=AUDIENCE, layout=LAYOUT, **values)


PLAIN = make(
    {
        "request_id": "r",
        "worker": "prefill-0",
        "incarnation": "i",
        "host": "h",
        "port": 1,
        "backend": "ucx",
        "blocks": (1, 2),
        "generations": (7, 8),
        "tokens": 20,
    }
)


@given(contents)
def test_survives_the_wire(values: dict[str, Any]) -> None:
    ticket = make(values)
    again = Ticket.from_wire(json.loads(json.dumps(ticket.to_wire())))
    assert again == ticket
    verify(again, KEY, audience=AUDIENCE)


@pytest.mark.parametrize("field", [field.name for field in fields(Ticket) if field.name not in ("mac", "version")])
def test_any_altered_field_is_noticed(field: str) -> None:
    value = getattr(PLAIN, field)
    other: Any = value + "x" if isinstance(value, str) else (*value, 3) if isinstance(value, tuple) else value + 1
    with pytest.raises(TicketError) as refused:
        verify(replace(PLAIN, **{field: other}), KEY, audience=AUDIENCE)
    assert refused.value.code == "forged"


@given(text)
def test_no_guessed_mac_passes(mac: str) -> None:
    with pytest.raises(TicketError):
        verify(replace(PLAIN, mac=mac), KEY, audience=AUDIENCE)


@pytest.mark.parametrize(
    ("key", "audience", "code"),
    [(OTHER, AUDIENCE, "forged"), (KEY, "ns/other", "audience")],
)
def test_is_good_for_one_cluster_and_audience(key: ClusterKey, audience: str, code: str) -> None:
    with pytest.raises(TicketError) as refused:
        verify(PLAIN, key, audience=audience)
    assert refused.value.code == code


def test_is_good_for_one_direction() -> None:
    other = replace(PLAIN, direction="decode>prefill").signed(KEY)
    with pytest.raises(TicketError) as refused:
        verify(other, KEY, audience=AUDIENCE)
    assert refused.value.code == "direction"


def test_every_block_has_its_generation() -> None:
    with pytest.raises(TicketError, match="2 blocks and 1 generations"):
        Ticket.from_wire({**PLAIN.to_wire(), "generations": [7]})


def test_no_two_tickets_are_equal() -> None:
    values = {f.name: getattr(PLAIN, f.name) for f in fields(PLAIN)}
    for name in ("issued_at", "expires_at", "nonce", "mac", "version", "direction", "audience", "layout"):
        del values[name]
    assert make(values).nonce != make(values).nonce


@given(json_values)
def test_any_json_is_refused_with_a_reason(value: object) -> None:
    with pytest.raises(TicketError):
        Ticket.from_wire(value)


@given(st.sampled_from(sorted(PLAIN.to_wire())), json_values)
def test_any_json_in_any_field_is_read_or_refused(field: str, value: object) -> None:
    wire = {**PLAIN.to_wire(), field: value}
    try:
        ticket = Ticket.from_wire(wire)
    except TicketError as error:
        assert error.code in ("malformed", "version")
        return
    if ticket != PLAIN:
        with pytest.raises(TicketError):
            verify(ticket, KEY, audience=AUDIENCE)


@pytest.mark.parametrize("change", [{"extra": 1}, {"mac": None}])
def test_unknown_and_missing_fields_are_refused(change: dict[str, Any]) -> None:
    wire = {**PLAIN.to_wire(), **change}
    wire = {key: value for key, value in wire.items() if value is not None}
    with pytest.raises(TicketError) as refused:
        Ticket.from_wire(wire)
    assert refused.value.code == "malformed"
