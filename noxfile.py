"""The one place a person starts from: `nox -l` is the menu.

Sessions share two environments under `.nox/`: `deploy` (what a controller needs) and `dev` (that and the
test tools), each rebuilt only when its lock file changes. Arguments after `--` go to ansible-playbook.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
REPORTS = CACHE / "reports"
WORKER_WHEELS = "templates/images/requirements-worker.txt"

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.error_on_external_run = False

# Molecule writes an ansible.cfg of its own, so what ansible.cfg says about paths is said here once more;
# the environment wins over either file.
ENV = {
    "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
    "ANSIBLE_FILTER_PLUGINS": str(ROOT / "plugins/filter"),
    "ANSIBLE_LIBRARY": str(ROOT / "plugins/modules"),
    "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "plugins/callback"),
    "ANSIBLE_COLLECTIONS_PATH": str(CACHE / "collections"),
    "ANSIBLE_PRECEDENCE": "all_plugins_inventory, all_inventory, groups_inventory, all_plugins_play,"
    " groups_plugins_inventory, groups_plugins_play",
    "ANSIBLE_PIPELINING": "true",
    "ANSIBLE_INJECT_FACT_VARS": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(ROOT / "src"),
}


def environment(session: nox.Session, name: str) -> dict[str, str]:
    """Make the environment `name` if its lock files changed, and return the process environment that uses it."""
    home = ROOT / ".nox" / f"env-{name}"
    locks = [ROOT / "requirements" / f"{name}.txt"]
    if name == "dev":
        locks.append(ROOT / WORKER_WHEELS)
    stamp = hashlib.sha256(sys.version.encode() + b"".join(lock.read_bytes() for lock in locks)).hexdigest()
    marker = home / "pdstack.stamp"
    python = home / "bin" / "python"
    if not marker.is_file() or marker.read_text() != stamp:
        session.log(f"creating the {name} environment (about a minute, once)")
        shutil.rmtree(home, ignore_errors=True)
        session.run_always(sys.executable, "-m", "virtualenv", "-q", str(home), external=True)
        pip = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check"]
        session.run_always(*pip, "--require-hashes", "-r", str(locks[0]), external=True)
        for lock in locks[1:]:
            session.run_always(*pip, "--require-hashes", "--no-deps", "-r", str(lock), external=True)
        marker.write_text(stamp)
    env = ENV | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(home)}
    session.run_always(str(python), "-m", "pdstack.deploy.collections", "--cache", str(CACHE), env=env, external=True)
    return env


def run(session: nox.Session, env: dict[str, str], program: str, *args: str) -> None:
    """Run a program of the environment (nox looks programs up before it applies `env`)."""
    session.run(f"{env['VIRTUAL_ENV']}/bin/{program}", *args, env=env, external=True)


def junit(name: str) -> str:
    """Return pytest's option that keeps the results of a session for `report`."""
    return f"--junitxml={REPORTS / name}.xml"


def test_servers(session: nox.Session, env: dict[str, str]) -> dict[str, str]:
    """Unpack etcd and NATS of the distribution for the integration tests; without apt they must be on the PATH."""
    home = CACHE / "test-servers"
    if not (home / "rootfs").is_dir() and shutil.which("apt-get") and os.geteuid() == 0:
        session.run("apt-get", "update", "--quiet=2", external=True)
        files = ("usr/bin/etcd", "usr/sbin/nats-server")
        wanted = [word for deb in ("etcd-server", "nats-server") for word in ("--deb", deb)]
        wanted += [word for file in files for word in ("--file", file)]
        run(session, env, "python", "-m", "pdstack.deploy.imagecontext", "binaries", "--out", str(home), *wanted)
    return env | {"PDSTACK_TEST_BIN": f"{home}/rootfs/usr/bin{os.pathsep}{home}/rootfs/usr/sbin"}


def playbook(session: nox.Session, name: str, *args: str) -> None:
    """Run a playbook over the inventory that the arguments name, or over inventories/local."""
    given = any(arg == "-i" or arg.startswith(("-i", "--inventory")) for arg in args)
    common = ["-i", "inventories/common"] if given else []
    run(session, environment(session, "deploy"), "ansible-playbook", *common, name, *args)


@nox.session(default=False)
def deploy(session: nox.Session) -> None:
    """Bring the inventory up: validate, hosts, images, coordination, serving, verify."""
    playbook(session, "site.yml", *session.posargs)


@nox.session(default=False)
def verify(session: nox.Session) -> None:
    """Prove a running deployment: versions, health, answers token for token, the KV path."""
    playbook(session, "playbooks/verify.yml", "-e", "verify__depth=full", *session.posargs)


@nox.session(default=False)
def status(session: nox.Session) -> None:
    """Show each service of the inventory: version, health, endpoint."""
    playbook(session, "playbooks/status.yml", *session.posargs)


@nox.session(default=False)
def doctor(session: nox.Session) -> None:
    """Check every host, read-only: found, wanted, fix; exit 0 fine, 1 warnings, 2 failures (-- -i INVENTORY --json)."""
    args: list[str] = []
    shown: list[str] = []
    for arg in session.posargs:
        # These are about the report; the rest is for ansible-playbook.
        (shown if arg in ("--json", "--all") else args).append("--print-json" if arg == "--json" else arg)
    file = ROOT / ".pdstack" / "doctor.json"
    playbook(session, "playbooks/doctor.yml", "-e", f"doctor_file={file}", "-e", "doctor_table=false", *args)
    env = environment(session, "deploy")
    report = [f"{env['VIRTUAL_ENV']}/bin/python", "-m", "pdstack.doctor.report", "--json", str(file), *shown]
    # Nox itself knows only 0 and 1 for a session.
    sys.exit(subprocess.run(report, env=os.environ | env, cwd=ROOT, check=False).returncode)


@nox.session(default=False)
def new_inventory(session: nox.Session) -> None:
    """Write an inventory for your hosts (-- NAME --hosts h1=10.0.0.1,h2 --prefill 2 --decode 2; --help for all)."""
    run(session, environment(session, "deploy"), "python", "-m", "pdstack.deploy.new_inventory", *session.posargs)


@nox.session(default=False)
def destroy(session: nox.Session) -> None:
    """Remove everything the inventory deployed (-- --purge: images, caches and model too)."""
    args = list(session.posargs)
    if "--purge" in args:
        args.remove("--purge")
        args += ["-e", "pdstack_purge=true"]
    playbook(session, "playbooks/lifecycle/destroy.yml", *args)


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """Ruff, mypy strict, yamllint, ansible-lint production, role specs equal to defaults, role READMEs fresh."""
    env = environment(session, "dev")
    run(session, env, "ruff", "check", ".")
    run(session, env, "ruff", "format", "--check", ".")
    run(session, env, "mypy")
    run(session, env, "yamllint", "--strict", ".")
    run(session, env, "python", "-m", "pdstack.deploy.argspecs", "--check")
    run(session, env, "python", "-m", "pdstack.deploy.roledocs", "--check")
    run(session, env, "ansible-lint", "--offline", "--strict", "-c", ".config/ansible-lint.yml")


@nox.session(default=False)
def unit(session: nox.Session) -> None:
    """Unit tests, broken inventories and hosts, the workers against a real etcd, NATS and frontend; no containers."""
    env = test_servers(session, environment(session, "dev"))
    suites = ("tests/unit", "tests/inventory_cases", "tests/lab/test_broken_hosts.py", "tests/integration")
    run(session, env | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}, "pytest", *suites, junit("unit"), *session.posargs)


@nox.session(default=False)
def molecule(session: nox.Session) -> None:
    """A scenario for every Ansible role on a systemd container (-- SCENARIO for one of them)."""
    env = environment(session, "dev")
    run(session, env | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}, "python", "-m", "tests.molecule", *session.posargs)


@nox.session(default=False)
def lab(session: nox.Session) -> None:
    """Several hosts on one machine: clusters, rolling changes, a rehearsal of GPU hosts, broken hosts (-- FILE)."""
    env = environment(session, "dev")
    path = {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    run(session, env | path, "pytest", *(session.posargs or ["tests/lab"]), "-x", "-s")


@nox.session(default=False)
def e2e(session: nox.Session) -> None:
    """Deploy, verify over both backends, kill each container in turn, destroy."""
    env = environment(session, "dev")
    run(session, env, "pytest", "tests/e2e", "-x", "-s", junit("e2e"), *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """What disaggregation costs the first token, beside one aggregated worker (-- --model DIR, see --help)."""
    env = test_servers(session, environment(session, "dev"))
    path = {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    run(session, env | path, "python", "-m", "benchmarks.ttft", *session.posargs)


@nox.session(default=False)
def ab(session: nox.Session) -> None:
    """The served model over several ways to move KV, side by side (-- ucx nixl shared ..., see --help)."""
    env = test_servers(session, environment(session, "dev"))
    path = {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    run(session, env | path, "python", "-m", "benchmarks.ab", *(session.posargs or ["ucx", "nixl"]))


@nox.session(default=False)
def bench_kv(session: nox.Session) -> None:
    """How fast KV moves here: own paths beside NIXL, UCX, Mooncake and the limit (-- --quick, see --help)."""
    env = environment(session, "dev")
    rival = CACHE / "bench"
    if not rival.is_dir():
        pip = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        wanted = ["--target", str(rival), "-r", "requirements/bench.txt"]
        # No wheel for this Python, or no index within reach: the benchmark says what it had to leave out.
        session.run(f"{env['VIRTUAL_ENV']}/bin/python", *pip, *wanted, env=env, external=True, success_codes=[0, 1])
    path = {"PYTHONPATH": f"{ROOT}/src:{ROOT}:{rival}"}
    run(session, env | path, "python", "-m", "benchmarks.kv_paths", *session.posargs)


@nox.session(default=False)
def bench_idle(session: nox.Session) -> None:
    """What idle agents cost, and how soon prefill hears that decode has all (-- --first, see --help)."""
    env = environment(session, "dev")
    path = {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    run(session, env | path, "python", "-m", "benchmarks.kv_idle", *session.posargs)


@nox.session(default=False)
def bench_gpu(session: nox.Session) -> None:
    """KV between two processes' GPU memory: kernel, agents, torch, NIXL, the limit (on a GPU host, its own python3)."""
    # Torch and Triton are the host's or the image's: they fit its driver, and are in no lock file here.
    session.run("python3", "benchmarks/gpu_paths.py", *session.posargs, env={"PYTHONUNBUFFERED": "1"}, external=True)


@nox.session(default=False)
def kv_path(session: nox.Session) -> None:
    """Measure the KV path of an inventory again (-- -i INVENTORY), or of processes here (-- --local, see --help)."""
    if {"--local", "--agents", "--help"} & set(session.posargs):
        run(session, environment(session, "dev"), "python", "-m", "pdstack", "kv-path", *session.posargs)
    else:
        playbook(session, "playbooks/kv_path.yml", "-e", "kv_path_force=true", *session.posargs)


@nox.session(default=False)
def chaos(session: nox.Session) -> None:
    """Faults at random points of KV transfers between real processes (-- --points 1000 --seed N, see --help)."""
    env = environment(session, "dev")
    run(session, env | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}, "python", "-m", "tests.chaos", *session.posargs)


@nox.session(default=False)
def tests(session: nox.Session) -> None:
    """Everything above that tests, in order; stops a container engine that it had to start."""
    shutil.rmtree(REPORTS, ignore_errors=True)
    for name in ("lint", "unit", "molecule", "e2e", "stop_engine", "report"):
        session.notify(name)


@nox.session(default=False)
def report(session: nox.Session) -> None:
    """Say once more which tests failed in the last run and why."""
    session.run(sys.executable, "-m", "tests.report", *map(str, sorted(REPORTS.glob("*.xml"))), external=True)


@nox.session(default=False)
def stop_engine(session: nox.Session) -> None:
    """Stop the container engine if pdstack started it and nothing runs on it."""
    playbook(session, "playbooks/lifecycle/stop_engine.yml", *session.posargs)


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Renew requirements/*.txt from requirements/*.in (needs uv on the PATH)."""
    for name in ("deploy", "dev"):
        session.run(
            "uv", "pip", "compile", "--quiet", "--universal", "--upgrade", "--generate-hashes",
            "--python-version", "3.11", "--no-emit-index-url", "--custom-compile-command", "nox -s lock",
            f"requirements/{name}.in", "-o", f"requirements/{name}.txt", external=True,
        )  # fmt: skip


if __name__ == "__main__":
    nox.main()
