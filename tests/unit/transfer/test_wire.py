"""Frames, greetings and seals, on bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.transfer import AuthenticationFailed, ClusterKey, ProtocolError, Role, TransferError
from pdstack.transfer.wire import MAX_GREETING, Greeting, Handshake, Seal, encode, frame_length, parse

KEY, OTHER = ClusterKey(b"k" * 32), ClusterKey(b"o" * 32)
HELLO = Greeting.new("decode-0", "i", Role.DECODE, "a")
WELCOME = Greeting.new("prefill-0", "j", Role.PREFILL, "a")

messages = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=4).map(
    lambda message: {**message, "type": "t"}
)


def seals(key: ClusterKey = KEY) -> tuple[Seal, Seal]:
    handshake = Handshake(key, HELLO, WELCOME)
    return handshake.seal(Role.DECODE), handshake.seal(Role.PREFILL)


@given(st.binary(max_size=200))
def test_a_frame_says_its_length(body: bytes) -> None:
    frame = encode(body, 200)
    assert frame_length(frame[:4], 200) == len(body)
    assert frame[4:] == body


@given(st.binary(min_size=4, max_size=4))
def test_no_announced_length_is_believed_above_the_limit(header: bytes) -> None:
    try:
        assert frame_length(header, MAX_GREETING) <= MAX_GREETING
    except ProtocolError:
        assert int.from_bytes(header, "big") > MAX_GREETING


@given(st.binary(max_size=300) | st.integers(1, 400).map(lambda depth: b"[" * depth * 100))
def test_any_bytes_are_a_message_or_an_error(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(parse(body)["type"], str)


@given(st.dictionaries(st.sampled_from([*HELLO.message("hello")]), st.none() | st.integers() | st.text(max_size=300)))
def test_any_greeting_is_read_or_refused(change: dict[str, object]) -> None:
    try:
        Greeting.parse({**HELLO.message("hello"), **change})
    except TransferError as error:
        assert isinstance(error, ProtocolError)


@given(st.lists(messages, max_size=5))
def test_sealed_messages_arrive_in_order(sent: list[dict[str, object]]) -> None:
    decode, prefill = seals()
    for message in sent:
        assert prefill.check(decode.sign(message)) == message
        assert decode.check(prefill.sign(message)) == message


@given(messages, st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_byte_is_noticed(message: dict[str, object], place: int, flip: int) -> None:
    decode, prefill = seals()
    frame = bytearray(decode.sign(message))
    frame[place % len(frame)] ^= flip
    with pytest.raises(AuthenticationFailed):
        prefill.check(bytes(frame))


@given(st.binary(max_size=100))
def test_no_stranger_can_seal(frame: bytes) -> None:
    with pytest.raises(AuthenticationFailed):
        seals()[0].check(frame)


def test_repeated_reordered_and_reflected_frames_are_refused() -> None:
    decode, _ = seals()
    first, second = decode.sign({"type": "1"}), decode.sign({"type": "2"})
    for frames in ([first, first], [second]):
        receiver = seals()[1]
        with pytest.raises(AuthenticationFailed):
            for frame in frames:
                receiver.check(frame)
    with pytest.raises(AuthenticationFailed):
        decode.check(first)


def test_each_connection_and_key_has_its_own_seal() -> None:
    frame = seals()[0].sign({"type": "t"})
    with pytest.raises(AuthenticationFailed):
        seals(OTHER)[1].check(frame)
    again = Handshake(KEY, Greeting.new("decode-0", "i", Role.DECODE, "a"), WELCOME)
    with pytest.raises(AuthenticationFailed):
        again.seal(Role.PREFILL).check(frame)


def test_proofs_differ_by_side_and_key() -> None:
    mine, theirs = Handshake(KEY, HELLO, WELCOME), Handshake(OTHER, HELLO, WELCOME)
    assert len({mine.prefill_proof, mine.decode_proof, theirs.prefill_proof, theirs.decode_proof}) == 4
    with pytest.raises(AuthenticationFailed):
        mine.check(mine.prefill_proof, mine.decode_proof, "x")
    with pytest.raises(AuthenticationFailed):
        mine.check(None, mine.decode_proof, "x")
