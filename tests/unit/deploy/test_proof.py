from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.deploy import proof

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
    "vocab_size": 49152,
}  # fmt: skip
DEPLOYMENT: dict[str, Any] = {"images": {"worker": "w:1"}, "model": {"id": "m"}, "engine_settings": {"block_size": 16}}


def test_a_block_of_smollm2_is_720_kib() -> None:
    assert proof.ModelShape.from_config(CONFIG).block_bytes(16) == 720 * 1024


def test_heads_and_dimension_are_derived_when_the_config_leaves_them_out() -> None:
    shape = proof.ModelShape.from_config(
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "vocab_size": 10}
    )
    assert (shape.kv_heads, shape.head_dim) == (4, 32)


@given(context=st.integers(64, 8192), block_size=st.sampled_from([8, 16, 32]))
def test_full_has_at_least_twenty_lengths_from_one_up_to_what_fits(context: int, block_size: int) -> None:
    lengths = proof.prompt_lengths(context, block_size, "full")
    assert len(lengths) >= 20
    assert lengths[0] == 1
    assert lengths[-1] == min(1500, context - proof.MAX_TOKENS - 1)
    assert lengths == sorted(set(lengths))


def test_full_reaches_1500_and_quick_is_shorter() -> None:
    full, quick = (proof.prompt_lengths(2048, 16, depth) for depth in ("full", "quick"))
    assert full[-1] == 1500
    assert sum(quick) < sum(full) / 4
    assert {15, 16, 17} <= set(quick)


def test_prompts_are_the_same_each_time_and_within_the_vocabulary() -> None:
    first, second = (proof.prompts([1, 5, 50], 7) for _ in range(2))
    assert first == second
    assert [len(prompt) for prompt in first] == [1, 5, 50]
    assert {token for prompt in first for token in prompt} <= set(range(7))


def test_whole_blocks_move() -> None:
    assert proof.expected_bytes([1, 16, 17], 16, 100) == (1 + 1 + 2) * 100


@pytest.mark.parametrize("change", [{"images": {"worker": "w:2"}}, {"model": {"id": "n"}}, {"engine_settings": {}}])
def test_the_reference_is_named_by_what_decides_it(change: dict[str, Any]) -> None:
    requests = [{"token_ids": [1]}]
    key = proof.reference_key(DEPLOYMENT, requests)
    assert key == proof.reference_key({**DEPLOYMENT, "name": "other"}, requests)
    assert key != proof.reference_key({**DEPLOYMENT, **change}, requests)
    assert key != proof.reference_key(DEPLOYMENT, [{"token_ids": [2]}])


def test_equal_answers_have_no_difference() -> None:
    assert proof.differences([[1, 2]], [(1, 2)], ["a"]) == []


def test_a_difference_names_the_first_wrong_token() -> None:
    (line,) = proof.differences([[1, 2, 3]], [[1, 9, 3]], ["prompt of 5"])
    assert "prompt of 5" in line
    assert "token 1" in line


def test_a_missing_tail_is_a_difference() -> None:
    (line,) = proof.differences([[1, 2, 3]], [[1, 2]], ["a"])
    assert "token 2" in line


def test_many_differences_are_cut() -> None:
    lines = proof.differences([[1]] * 9, [[2]] * 9, [str(n) for n in range(9)])
    assert len(lines) == 6
    assert "4 more" in lines[-1]


def test_speed_is_the_median_of_the_larger_transfers() -> None:
    transfers = [
        {"bytes": 10, "seconds": 10.0},
        {"bytes": 4_000_000_000, "seconds": 1.0},
        {"bytes": 2_000_000_000, "seconds": 1.0},
    ]
    assert proof.transfer_speed(transfers) == pytest.approx(3.0)
    assert proof.transfer_speed([]) is None


def test_metrics_are_summed_over_the_wanted_labels() -> None:
    text = "".join(
        f"{line}\n"
        for line in (
            "# HELP x",
            'x_total{backend="ucx",peer="a"} 2.0',
            'x_total{backend="ucx",peer="b"} 3',
            'x_total{backend="nixl"} 5',
            "y 7",
        )
    )
    assert proof.metric(text, "x_total", backend="ucx") == 5
    assert proof.metric(text, "x_total") == 10
    assert proof.metric(text, "y") == 7
    assert proof.metric(text, "z") == 0


@pytest.mark.parametrize(
    ("connection", "spec"),
    [
        ({"ansible_connection": "local"}, "local://"),
        ({"ansible_connection": "community.docker.docker"}, "docker://h"),
        ({}, "ssh://h"),
        (
            {
                "ansible_host": "10.0.0.1",
                "ansible_user": "ops",
                "ansible_port": 2222,
                "ansible_ssh_private_key_file": "/k",
            },
            "ssh://ops@10.0.0.1:2222?sudo=True&ssh_identity_file=/k",
        ),
    ],
)
def test_testinfra_connects_itself(connection: dict[str, Any], spec: str) -> None:
    assert proof.testinfra_spec("h", connection) == spec


def test_a_slow_connection_is_refused() -> None:
    with pytest.raises(ValueError, match="winrm"):
        proof.testinfra_spec("h", {"ansible_connection": "winrm"})
