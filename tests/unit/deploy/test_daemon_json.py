from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.deploy import daemon_json

SCALARS = st.one_of(st.booleans(), st.integers(0, 3), st.sampled_from(["a", "b"]))
KEYS = st.sampled_from(["debug", "log-opts", "hosts", "runtimes", "x"])
DOCUMENTS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(KEYS, st.one_of(SCALARS, st.lists(st.sampled_from(["a", "b", "c"]), unique=True))),
    lambda inner: st.dictionaries(KEYS, st.one_of(SCALARS, inner)),
    max_leaves=6,
)


def test_settings_join_a_file_of_somebody_else() -> None:
    text = '{"data-root": "/srv/docker", "log-opts": {"max-size": "1m"}, "dns": ["10.0.0.2"]}'
    result = daemon_json.update(text, {"live-restore": True, "log-opts": {"max-file": "3"}, "dns": ["10.0.0.3"]})
    assert json.loads(result["content"]) == {
        "data-root": "/srv/docker",
        "log-opts": {"max-size": "1m", "max-file": "3"},
        "dns": ["10.0.0.2", "10.0.0.3"],
        "live-restore": True,
    }
    assert result["conflicts"] == []
    assert result["foreign"]


def test_what_a_person_set_stays_and_is_told() -> None:
    result = daemon_json.update('{"log-opts": {"max-size": "1m"}}', {"log-opts": {"max-size": "9m"}})
    assert json.loads(result["content"]) == {"log-opts": {"max-size": "1m"}}
    (conflict,) = result["conflicts"]
    assert "log-opts.max-size" in conflict
    assert "'1m'" in conflict
    assert "'9m'" in conflict


def test_what_the_last_run_set_follows_the_inventory() -> None:
    merged, conflicts = daemon_json.merge({"debug": True, "x": 1, "mine": 2}, {"debug": False}, {"debug": True, "x": 1})
    assert merged == {"debug": False, "mine": 2}
    assert conflicts == []


def test_what_a_person_changed_after_us_is_theirs() -> None:
    merged, conflicts = daemon_json.merge({"debug": False}, {"debug": True}, {"debug": True})
    assert merged == {"debug": False}
    assert len(conflicts) == 1


def test_an_equal_file_keeps_its_bytes() -> None:
    text = '{"live-restore":true,\n\t"debug": false}'
    assert daemon_json.update(text, {"live-restore": True})["content"] == text


@pytest.mark.parametrize("text", ["", "  \n"])
def test_no_file_and_an_empty_one_are_the_same(text: str) -> None:
    result = daemon_json.update(text, {"live-restore": True})
    assert json.loads(result["content"]) == {"live-restore": True}
    assert not result["foreign"]


def test_nothing_is_written_where_nothing_is_left() -> None:
    assert daemon_json.update('{"live-restore": true}', {}, {"live-restore": True})["content"] == ""


@pytest.mark.parametrize(("text", "found"), [("{,}", "line 1"), ("[1]", "a list"), ("null", "a NoneType")])
def test_a_file_that_is_no_object_is_refused(text: str, found: str) -> None:
    with pytest.raises(daemon_json.DaemonJsonError, match=found):
        daemon_json.update(text, {"a": 1})


@given(DOCUMENTS, DOCUMENTS)
def test_a_second_run_changes_nothing(existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    first, _ = daemon_json.merge(existing, wanted)
    second, _ = daemon_json.merge(first, wanted, wanted)
    assert second == first


@given(DOCUMENTS, DOCUMENTS)
def test_no_scalar_of_the_host_is_ever_changed(existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    merged, _ = daemon_json.merge(existing, wanted)
    for key, value in existing.items():
        if not isinstance(value, dict | list):
            assert merged[key] == value


@given(DOCUMENTS)
def test_removal_undoes_the_first_write(wanted: dict[str, Any]) -> None:
    merged, _ = daemon_json.merge({"theirs": 1}, wanted)
    assert daemon_json.merge(merged, {}, wanted)[0] == {"theirs": 1}
