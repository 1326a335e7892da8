from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdstack.deploy import schema, validate, versions


def found(inventory: Any, hosts: dict[str, Any] | None = None, **changed: Any) -> list[validate.Problem]:
    return validate.problems(inventory.groups(), hosts or inventory.hosts(), inventory.settings(**changed))


def test_the_common_settings_are_valid(inventory: Any) -> None:
    assert found(inventory) == []


def test_every_setting_of_the_dict_is_checked(inventory: Any) -> None:
    # A setting that nothing looks at could be misspelt for ever.
    handled = {*schema.CHOICES, *schema.SCALARS}
    handled |= {"pdstack_ports", "engine_defaults", "transfer_defaults", "transfer_settings", "versions", "kv_fabrics"}
    handled |= {"trtllm_engine_defaults", "trtllm_engine", "trtllm_args"}
    assert set(inventory.common["pdstack_settings"]) == handled


def test_defaults_have_exactly_the_keys_of_the_schema(inventory: Any) -> None:
    assert set(inventory.common["engine_defaults"]) == set(schema.ENGINE_SETTINGS)
    assert set(inventory.common["transfer_defaults"]) == set(schema.TRANSFER_SETTINGS)
    assert set(inventory.common["pdstack_ports"]) == set(schema.PORTS)
    assert set(inventory.common["versions"]) == set(schema.VERSIONS)
    assert set(inventory.common["versions"]["gpu"]) == set(schema.GPU_VERSIONS)
    required = {key for key, field in schema.TRTLLM_RUNTIME.items() if field.required}
    assert required == set(inventory.common["versions"]["trtllm_runtime"]) - {"commit"}


@pytest.mark.parametrize("key", sorted(schema.CHOICES))
def test_unknown_choice_is_found(inventory: Any, key: str) -> None:
    problems = found(inventory, **{key: "nonsense"})
    assert [problem.what for problem in problems] == [key]
    assert problems[0].wanted.startswith("one of ")


@pytest.mark.parametrize("group", ["etcd", "nats"])
@pytest.mark.parametrize(
    ("count", "problem"), [(1, False), (2, True), (3, False), (4, True), (5, False), (6, True), (7, True)]
)
def test_a_quorum_wants_an_odd_number(inventory: Any, group: str, count: int, problem: bool) -> None:
    names = [f"h{number}" for number in range(count)]
    groups = inventory.groups(**{group: names})
    problems = validate.problems(groups, inventory.hosts("a", *names), inventory.settings())
    assert any(f"group {group}" in item.what for item in problems) is problem


@pytest.mark.parametrize(
    ("release", "allowed"),
    [("1.2.0rc3", True), ("1.2.0rc2", False), ("1.1.9", False), ("1.2.0", True), ("1.2.0rc3.post1", True),
     ("1.2.0rc10", True), ("1.2.0.dev5", False), ("2.0.0a1", True), ("", False), ("latest", False)],
)  # fmt: skip
def test_nixl_gate_compares_by_pep_440(release: str, allowed: bool) -> None:
    assert versions.nixl_allowed(release) is allowed


def test_old_tensorrt_llm_matters_to_nixl_only(inventory: Any) -> None:
    pins = inventory.common["versions"] | {"tensorrt_llm": "1.1.0"}
    assert found(inventory, versions=pins, kv_transfer_backend="ucx") == []
    assert "nixl" in found(inventory, versions=pins, kv_transfer_backend="nixl")[0].what


def test_a_number_from_the_command_line_is_a_number(inventory: Any) -> None:
    assert found(inventory, pdstack_port_offset="25000", drain_timeout_s="5.5") == []
    assert found(inventory, pdstack_port_offset="25k")[0].what == "pdstack_port_offset"


def test_true_is_no_number(inventory: Any) -> None:
    problems = found(inventory, inventory.hosts(engine_settings={"threads": True}))
    assert [problem.what for problem in problems] == ["engine_settings.threads"]


def test_one_host_with_a_wrong_setting_is_named(inventory: Any) -> None:
    hosts = inventory.hosts("a", "b", kv_fabric="tcp")
    hosts["b"]["engine_settings"] = {"kv_blocks": 0}
    problems = validate.problems(inventory.groups(prefill=["a", "b"]), hosts, inventory.settings())
    assert [problem.what for problem in problems] == ["engine_settings on b.kv_blocks"]


def test_default_names_collide_with_given_ones(inventory: Any) -> None:
    hosts = inventory.hosts(prefill_workers=[{}, {"name": "prefill-0"}])
    assert "worker name prefill-0" in [problem.what for problem in found(inventory, hosts)]


def test_all_problems_come_at_once_and_are_rendered(inventory: Any) -> None:
    problems = found(inventory, router_mode="x", image_source="y", pdstack_ports={"frontend": "z"})
    text = validate.render(problems)
    assert "cannot be deployed" in text
    assert len(re.findall(r"^\d+\. ", text, re.MULTILINE)) == len(problems) >= 3
    assert text.count("fix:") == text.count("wanted:") == text.count("found:") == len(problems)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(data=st.data())
def test_no_value_of_any_variable_breaks_the_check(inventory: Any, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(inventory.common["pdstack_settings"])))
    engine = data.draw(st.sampled_from(schema.CHOICES["engine"]))
    chosen = inventory.settings(engine=engine) | {key: data.draw(anything)}
    variable = data.draw(
        st.sampled_from(["engine_settings", "kv_fabric", "prefill_workers", "decode_workers", *schema.GPU_HOST])
    )
    fabric = {"kv_fabric": data.draw(st.sampled_from(sorted(inventory.common["kv_fabrics"])))}
    hosts = inventory.hosts(**(fabric | {variable: data.draw(anything)}))
    for problem in validate.problems(inventory.groups(), hosts, chosen):
        assert problem.found
        assert problem.wanted
        assert problem.fix


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(data=st.data())
def test_no_entry_of_a_gpu_worker_breaks_the_check(inventory: Any, data: st.DataObject) -> None:
    entry = data.draw(st.dictionaries(st.sampled_from(sorted(schema.GPU_WORKER)), anything))
    hosts = inventory.hosts(prefill_workers=[entry], gpu_count=data.draw(st.none() | st.integers(-1, 9) | st.text()))
    assert isinstance(validate.problems(inventory.groups(), hosts, inventory.settings(engine="trtllm")), list)


def test_what_may_have_been_forgotten_is_said(inventory: Any) -> None:
    workers = {"prefill_workers": [{"gpus": [0]}], "decode_workers": [{"gpus": [1]}]}
    hosts = inventory.hosts(ansible_host="192.0.2.7", ansible_connection="ssh", gpu_count=4, **workers)
    notes = validate.notes(inventory.groups(), hosts, inventory.settings(engine="trtllm"))
    assert "a (192.0.2.7)" in notes[0]
    assert notes[1] == "a: 2 of its 4 GPUs have no worker (2, 3)"
    full = inventory.hosts(gpu_count=2, **workers)
    assert validate.notes(inventory.groups(), full, inventory.settings(engine="trtllm")) == []


@pytest.mark.parametrize(
    ("found", "minimum", "older"),
    [("1.20.0-1", "1.17.8", False), ("1.17.7-1", "1.17.8", True), ("2.9", "2.9", False), ("x", "1", True)],
)
def test_the_revision_of_a_package_does_not_count(found: str, minimum: str, older: bool) -> None:
    assert versions.below(found, minimum) is older
