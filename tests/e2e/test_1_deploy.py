"""Deploy, deploy again, rehearse, verify over both backends. The files of this folder run in order, on one stack."""

from __future__ import annotations

from typing import Any

WORKERS = {"prefill-0", "decode-0", "decode-1"}
SERVICES = {"etcd", "nats", "frontend"} | WORKERS


def test_a_rehearsal_before_anything_exists_changes_nothing(stack: Any) -> None:
    run = stack.deploy("--check", "--diff")
    assert stack.inspect() == {}
    assert not stack.state_dir.exists()
    stack.report["rehearsal_s"] = round(run.seconds)


def test_deploy_brings_up_every_service(stack: Any) -> None:
    run = stack.deploy()
    stack.report["deploy_s"] = round(run.seconds)
    assert set(stack.inspect()) == SERVICES
    assert "curl -N" in run.output, "found no summary at the end of the run"


def test_the_kv_path_was_measured_before_the_workers_started(stack: Any) -> None:
    kept = stack.measured()
    assert [(pair["prefill"], pair["decode"]) for pair in kept["pairs"]] == [
        ("prefill-0", "decode-0"),
        ("prefill-0", "decode-1"),
    ]
    for pair in kept["pairs"]:
        assert pair["problems"] == []
        assert {one["path"] for one in pair["paths"] if one["error"] is None} >= {"shared", "cma", stack.backend}
    started = min(entry["State"]["StartedAt"] for name, entry in stack.inspect().items() if name in WORKERS)
    assert kept["date"][:19] <= started[:19]
    assert (stack.state_dir / "kv_path.html").is_file()


def test_a_second_deploy_changes_and_restarts_nothing(stack: Any) -> None:
    before = stack.started()
    run = stack.deploy()
    stack.report["second_deploy_s"] = round(run.seconds)
    assert run.changed == 0
    assert stack.started() == before
    assert "nothing that it depends on has changed" in run.output, "the KV path was measured again"


def test_a_path_that_is_too_slow_stops_the_deployment_before_the_workers(stack: Any) -> None:
    before, kept = stack.started(), stack.measured()
    # With another setting beside it the workers would be recreated, if the run came to them.
    run = stack.play("site.yml", "-e", "kv_path_floor=99", "-e", '{"engine_settings": {"queue_limit": 99}}')
    assert run.status != 0
    assert "The KV path does not hold. No worker was started or changed." in run.output
    assert "FAILED prefill-0 > decode-0: found" in run.output and "wanted at least 99.00" in run.output
    assert stack.started() == before, "a container was touched, or an end is left"
    assert stack.measured() == kept, "what passed before must stay in force"


def test_a_rehearsal_on_a_deployed_host_changes_nothing(stack: Any) -> None:
    before = stack.started()
    assert stack.deploy("--check", "--diff").changed == 0
    assert stack.started() == before


def test_status_names_every_service(stack: Any) -> None:
    run = stack.play("playbooks/status.yml")
    assert run.status == 0
    assert all(service in run.output for service in SERVICES)


def check_results(stack: Any) -> None:
    results = stack.results()
    assert results["passed"]
    assert results["depth"] == "full"
    assert results["kv"]["backend"] == stack.backend
    assert results["kv"]["bytes"] > 0
    assert results["equality"]["prompts"] >= 20
    stack.report[f"verify_{stack.backend}"] = results["kv"]


def test_verify_proves_the_deployment(stack: Any) -> None:
    stack.verify()
    check_results(stack)


# Last, so that the default backend is the one under the kills and the soak.
def test_the_other_backend_restarts_the_workers_only_and_is_proved_too(stack: Any) -> None:
    before = stack.started()
    stack.backend = "ucx"
    stack.deploy("-e", "verify__depth=full")
    after = stack.started()
    restarted = {service for service in SERVICES if after[service] != before[service]}
    assert restarted == WORKERS, "a changed backend concerns the workers and nothing else"
    check_results(stack)
