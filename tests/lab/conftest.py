"""The lab's hosts, and the deployments over them. The files of this folder run in order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from tests.lab import hosts
from tests.lab.cluster import ANSWER_TOKENS, KEEP, ROOT, Cluster

from pdstack.deploy import ask, proof
from pdstack.deploy.load import Load

HERE = Path(__file__).resolve().parent
HOSTS = 4
PROMPTS = 24


@pytest.fixture(scope="session")
def lab() -> Iterator[list[str]]:
    """Hosts that have a container engine and the images that this tree builds."""
    if not KEEP:
        hosts.down("")
    names = hosts.up(HOSTS)
    subprocess.run([sys.executable, "-m", "tests.lab", "images"], cwd=ROOT, check=True)
    yield names
    if not KEEP:
        hosts.down("")


@pytest.fixture(scope="session")
def cluster(lab: list[str]) -> Iterator[Cluster]:
    """The reference engine over the lab."""
    found = Cluster("lab", ["inventories/lab"])
    if not KEEP:
        found.play("playbooks/lifecycle/destroy.yml")  # what an earlier, interrupted run left on the controller
    yield found
    print("\nlab:\n" + json.dumps(found.report, indent=2))


@pytest.fixture(scope="session")
def deployed(cluster: Cluster) -> Cluster:
    """The deployment that the tests before have left, or a new one when a test is run by itself."""
    if not (cluster.state_dir / "deployment.json").exists():
        cluster.deploy()
    return cluster


@pytest.fixture(scope="session")
def undisturbed(deployed: Cluster) -> tuple[list[list[int]], list[str]]:
    """Prompts (token ids) of many lengths, and the text that each gives when nothing is in its way."""
    model = deployed.deployment["model"]
    config = json.loads((ROOT / ".cache/models" / model["id"] / "config.json").read_text())
    prompts = proof.prompts([1 + (37 * number) % 300 for number in range(PROMPTS)], config["vocab_size"], seed=7)
    url = deployed.topology["frontends"][0]["url"]
    answers = [ask.complete(url, model["name"], prompt, ANSWER_TOKENS) for prompt in prompts]
    problems = [answer.problem() for answer in answers if not answer.good]
    assert not problems, "\n".join(problems)
    return prompts, [answer.text for answer in answers]


@pytest.fixture
def load(deployed: Cluster, undisturbed: tuple[list[list[int]], list[str]]) -> Callable[..., Load]:
    """Make a load of so many streams over all frontends, or over those of a list; use it in a `with`."""
    prompts, texts = undisturbed
    name = deployed.deployment["model"]["name"]
    every = [entry["url"] for entry in deployed.topology["frontends"]]

    def make(streams: int, frontends: list[str] | None = None) -> Load:
        turn, urls = count(), frontends or every

        def one(prompt: int) -> ask.Answer:
            return ask.complete(urls[next(turn) % len(urls)], name, prompts[prompt], ANSWER_TOKENS, timeout_s=60)

        return Load(one, texts, streams)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Others' tests, where both are run, keep their order: their fixtures are made for it.
    mine = iter(sorted((item for item in items if HERE in item.path.parents), key=lambda item: item.path.name))
    items[:] = [next(mine) if HERE in item.path.parents else item for item in items]
