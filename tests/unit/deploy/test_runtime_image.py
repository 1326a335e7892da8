from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.standins import dynamo_source

from pdstack.deploy import build_job, runtime_image, runtime_probe
from pdstack.deploy.problem import Problem

PROJECT = Path(__file__).resolve().parents[3]
FLAGS = {"framework": "trtllm", "tensorrtllm-pip-wheel": "tensorrt-llm==1.2.0rc3", "target": "runtime"}
SOURCE = {"repository": "https://example.org/dynamo.git", "ref": "v0.7.0.post1", "commit": ""}
VERSIONS = {"tensorrt_llm": "1.2.0rc3", "dynamo": "0.7.0.post1"}


def plan(extra: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"source": SOURCE, "versions": VERSIONS, **more}
    return runtime_image.plan(FLAGS, extra or {}, **given)


def told(found: Iterable[Problem]) -> str:
    return runtime_image.render(list(found))


# --- what is built


def test_the_build_is_the_one_of_upstreams_page() -> None:
    argv = plan()["argv"]
    assert argv[:8] == [
        "bash", "./container/build.sh", "--framework", "trtllm", "--tensorrtllm-pip-wheel", "tensorrt-llm==1.2.0rc3",
        "--target", "runtime",
    ]  # fmt: skip
    assert argv[8:] == ["--no-tag-latest", "--tag", plan()["candidate"]]


def test_the_role_asks_for_the_pinned_wheel() -> None:
    defaults = (PROJECT / "roles/trtllm_image/defaults/main.yml").read_text()
    assert "'framework': 'trtllm', 'tensorrtllm-pip-wheel': 'tensorrt-llm==' ~ versions.tensorrt_llm" in defaults
    pins = yaml.safe_load((PROJECT / "inventories/common/group_vars/all/versions.yml").read_text())["versions"]
    assert f"tensorrt-llm=={pins['tensorrt_llm']}" == FLAGS["tensorrtllm-pip-wheel"]


def test_a_flag_is_repeated_for_a_list_and_has_no_value_for_true() -> None:
    words = runtime_image.flags({"build-arg": ["A=1", "B=2"], "no-cache": True, "make-efa": False, "base-image": ""})
    assert words == ["--build-arg", "A=1", "--build-arg", "B=2", "--no-cache"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"frame-work": "trtllm"}, "wanted options of build.sh"),
        ({"trtllm-use-nixl-kvcache-experimental": True}, "leave it out"),
        ({"no-cache": "yes"}, "wanted true or false"),
        ({"target": True}, "wanted a value"),
    ],
)
def test_flags_that_the_script_would_end_with_are_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        runtime_image.flags(flags)


@pytest.mark.parametrize("name", ["tag", "no-tag-latest", "dry-run"])
def test_a_site_cannot_take_the_roles_own_flags(name: str) -> None:
    with pytest.raises(ValueError, match="which the role sets"):
        plan({name: "x"})


def test_another_way_to_come_by_the_wheel_takes_the_place_of_the_download() -> None:
    chosen = plan({"tensorrtllm-pip-wheel-dir": "/wheels"})
    assert "--tensorrtllm-pip-wheel" not in chosen["argv"]
    assert chosen["wheel"] == ""
    assert chosen["argv"][-5:-3] == ["--tensorrtllm-pip-wheel-dir", "/wheels"]


def test_the_tag_carries_the_version_and_everything_that_decides_the_build() -> None:
    first = plan()
    assert first["ref"] == f"pdstack/trtllm-runtime:{first['tag']}"
    assert first["tag"].startswith("1.2.0rc3-")
    assert plan() == first
    others = [
        plan({"no-cache": True}),
        plan(source={**SOURCE, "ref": "v0.7.1"}),
        plan(source={**SOURCE, "commit": "abc"}),
        plan(versions={**VERSIONS, "dynamo": "0.7.1"}),
    ]
    assert len({each["tag"] for each in [first, *others]}) == 5


def test_a_pushed_image_is_named_for_its_registry_and_its_candidate_is_not() -> None:
    chosen = plan(push="registry.example.org/ai/")
    assert chosen["ref"] == f"registry.example.org/ai/trtllm-runtime:{chosen['tag']}"
    assert chosen["candidate"] == f"pdstack/trtllm-candidate:{chosen['tag']}"


def test_a_local_version_makes_a_tag_that_docker_takes() -> None:
    assert "+" not in plan(versions={**VERSIONS, "tensorrt_llm": "1.2.0rc3+cu130"})["ref"]


def test_an_archive_is_named_by_its_checksum_if_there_is_one(tmp_path: Path) -> None:
    archive = tmp_path / "runtime.tar.gz"
    archive.write_bytes(b"image")
    by_size = runtime_image.archive_reference(str(archive))
    os.utime(archive, (1, 1))
    assert runtime_image.archive_reference(str(archive)) != by_size
    checksum = hashlib.sha256(b"image").hexdigest()
    (tmp_path / "runtime.tar.gz.sha256").write_text(f"{checksum}  runtime.tar.gz\n")
    assert runtime_image.archive_reference(str(archive)) == f"pdstack/trtllm-runtime:archive-{checksum[:12]}"
    assert runtime_image.reference("archive", plan(), "", str(archive)).endswith(checksum[:12])


def test_what_is_no_checksum_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "x.tar.sha256").write_text("not a checksum\n")
    assert runtime_image.archive_checksum(str(tmp_path / "x.tar")) == ""


@pytest.mark.parametrize(
    ("reference", "is_pinned"),
    [
        ("registry.example.org:5000/ai/runtime:0.7.0.post1", True),
        ("registry.example.org/ai/runtime@sha256:" + "a" * 64, True),
        ("registry.example.org:5000/ai/runtime", False),
        ("registry.example.org/ai/runtime:latest", False),
        ("", False),
    ],
)
def test_a_moving_reference_is_no_pin(reference: str, is_pinned: bool) -> None:
    assert runtime_image.pinned(reference) is is_pinned


# --- what is refused before anything is done


def setting_problems(source: str = "build", **more: Any) -> str:
    given: dict[str, Any] = {
        "image": "", "archive": "", "tensorrt_llm": "1.2.0rc3", "backend": "ucx", "build_host": "a",
        "hosts": ["a", "b"], **more,
    }  # fmt: skip
    return told(runtime_image.setting_problems(source, **given))


def test_good_settings_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "runtime.tar").write_bytes(b"")
    assert setting_problems() == ""
    assert setting_problems("registry", image="registry.example.org/runtime:1", build_host="z") == ""
    assert setting_problems("archive", archive=str(tmp_path / "runtime.tar"), backend="nixl") == ""


@pytest.mark.parametrize(
    ("source", "more", "says"),
    [
        ("somewhere", {}, "one of build, registry, archive"),
        ("registry", {"image": "registry.example.org/runtime:latest"}, "a tag that does not move"),
        ("archive", {"archive": "/nowhere/runtime.tar"}, "a file on the controller"),
        ("archive", {}, "found:  nothing"),
        ("build", {"hosts": ["b"]}, "run without --limit"),
        ("build", {"tensorrt_llm": "1.2.0rc2", "backend": "nixl"}, "1.2.0rc3 or newer"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(source: str, more: dict[str, Any], says: str) -> None:
    text = setting_problems(source, **more)
    assert says in text
    assert "fix:" in text


HOST = {
    "git": "git version 2.39.5",
    "bash": "GNU bash, version 5.2.15(1)-release (x86_64-pc-linux-gnu)",
    "docker": "28.5.1",
    "buildx": "github.com/docker/buildx v0.29.1",
    "df": "Mounted on  Avail\n/           214748364800\n",
}


def host_problems(**more: str) -> str:
    return told(runtime_image.host_problems({**HOST, **more}, min_disk_mb=120000, cache_dir="/var/cache/x"))


def test_a_good_build_host_is_accepted() -> None:
    assert host_problems() == ""


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"git": ""}, "install git and git-lfs"),
        ({"bash": "GNU bash, version 3.2.57(1)-release"}, "found:  3"),
        ({"bash": ""}, "4 or newer"),
        ({"buildx": ""}, "no buildx beside Docker 28.5.1"),
        ({"df": "Mounted on Avail\n/var 1073741824\n"}, "1024 MiB free"),
    ],
)
def test_a_host_that_cannot_build_is_refused(more: dict[str, str], says: str) -> None:
    text = host_problems(**more)
    assert text.count("found:") == 1
    assert says in text


def test_a_docker_with_buildkit_of_its_own_needs_no_buildx() -> None:
    assert host_problems(buildx="", docker="20.10.24") == ""


def test_an_engine_that_is_still_to_come_is_no_problem() -> None:
    assert host_problems(buildx="", docker="") == ""


def tree_problems(dockerfile: str = "FROM x\n", script: str = "#!/usr/bin/env bash\n", wanted: str = "") -> str:
    return told(
        runtime_image.tree_problems(dockerfile, script, "tensorrt-llm==1.2.0rc3", "0123456789abcdef0123", wanted)
    )


def test_a_good_tree_is_accepted() -> None:
    assert tree_problems(wanted="0123456789ab") == ""


def test_a_dockerfile_that_hard_codes_another_wheel_is_refused() -> None:
    url = "https://pypi.nvidia.com/tensorrt-llm/tensorrt_llm-1.2.0rc2-cp312-cp312-linux_${ARCH_ALT}.whl"
    assert "the wheel of 1.2.0rc2, whatever --tensorrtllm-pip-wheel says" in tree_problems(f'RUN x="{url}"\n')
    assert tree_problems(f'RUN x="{url.replace("rc2", "rc3")}"\n') == ""
    assert tree_problems(f"# as it was: {url}\n") == ""


def test_a_tree_without_the_script_and_a_moved_ref_are_refused() -> None:
    text = tree_problems(script="", wanted="fedcba")
    assert "container/build.sh" in text
    assert "the ref was moved upstream" in text


# --- what must be in the image

IMAGE: dict[str, Any] = {
    "python": "3.12.3",
    "tensorrt_llm": {"module": "1.2.0rc3", "distribution": "1.2.0rc3"},
    "dynamo": "0.7.0.post1",
    "nixl": {"nixl": "0.7.1", "nixl-cu13": "0.7.1"},
    "nixl_abi": {"copies": ["/opt/nvidia/nvda_nixl/lib/libnixl.so"], "wrappers": ["w"], "missing": []},
    "ucx": "1.19.0",
    "etcd": "3.5.21",
    "nats": "2.10.28",
}
WANTED = {
    "tensorrt_llm": "1.2.0rc3", "dynamo": "0.7.0.post1", "nixl": "0.7.1", "ucx": "1.19.0", "python": "3.12",
    "etcd": "3.5.21", "nats": "2.10.28",
}  # fmt: skip


def image_problems(
    backend: str = "nixl", source: str = "build", wanted: dict[str, str] | None = None, **more: Any
) -> str:
    return told(runtime_image.image_problems({**IMAGE, **more}, wanted or WANTED, backend=backend, source=source))


def test_the_wanted_image_is_accepted() -> None:
    assert image_problems() == ""
    assert image_problems(tensorrt_llm={"module": "1.2.0rc3+cu130", "distribution": ""}) == ""


OLD = {"module": "1.2.0rc2", "distribution": "1.2.0rc2"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tensorrt_llm": OLD}, "found:  1.2.0rc2 (the wheel flag was ignored by the build script)"),
        ({"tensorrt_llm": OLD, "source": "registry"}, "set trtllm_image to the image of that version"),
        ({"tensorrt_llm": OLD}, "built against NIXL 0.5"),
        ({"tensorrt_llm": {}}, "tensorrt_llm.__version__ in the finished image\n   found:  nothing"),
        ({"tensorrt_llm": {"module": "1.2.0rc3", "distribution": "1.2.0rc2"}}, "two installations lie over each other"),
        ({"dynamo": "0.7.0"}, "ai-dynamo in the finished image"),
        ({"nixl": {"nixl-cu12": "0.8.0"}}, "found:  nixl-cu12 0.8.0"),
        ({"nixl": {}}, "NIXL in the finished image\n   found:  nothing"),
        ({"ucx": "1.20.0"}, "UCX (ucx_info -v)"),
        ({"python": "3.11.2"}, "wanted: 3.12"),
        ({"python": "3.120.1"}, "wanted: 3.12"),
        ({"etcd": ""}, "coordination_image: own"),
        ({"nats": "2.9.10"}, "nats-server"),
        ({"nixl_abi": {"missing": ["_ZN12nixlDescListC1Ebb"]}}, "NVIDIA/TensorRT-LLM#9752"),
    ],
)
def test_another_image_is_refused_with_found_wanted_and_fix(more: dict[str, Any], says: str) -> None:
    text = image_problems(**more)
    assert says in text
    assert text.count("fix:") >= 1


def test_the_gate_of_nixl_does_not_concern_ucx() -> None:
    wanted = {**WANTED, "tensorrt_llm": "1.2.0rc2"}
    assert image_problems(backend="ucx", tensorrt_llm=OLD, wanted=wanted) == ""
    assert "1.2.0rc3 or newer" in image_problems(backend="nixl", tensorrt_llm=OLD, wanted=wanted)


def test_what_is_not_wanted_is_not_checked() -> None:
    wanted = dict.fromkeys(WANTED, "")
    assert image_problems(backend="ucx", wanted=wanted, ucx="", nixl={}, python="2.7", tensorrt_llm={}) == ""


def inspected(**config: Any) -> list[dict[str, Any]]:
    return [
        {
            "Id": "sha256:x",
            "Architecture": "amd64",
            "RootFS": {"Type": "layers", "Layers": ["sha256:a", "sha256:b"]},
            "Config": {
                "Env": ["A=1"],
                "Entrypoint": ["e"],
                "Cmd": None,
                "User": "dynamo",
                "WorkingDir": "/w",
                **config,
            },
        }
    ]


def test_the_digest_says_whether_two_hosts_have_the_same_image() -> None:
    digest = runtime_image.content_digest(inspected())
    again = [{**inspected()[0], "Id": "sha256:of another store", "RepoTags": ["x:y"]}]
    assert runtime_image.content_digest(again) == digest
    assert runtime_image.content_digest(inspected(Cmd=[])) == digest
    assert runtime_image.content_digest(inspected(Env=["A=2"])) != digest
    fewer = [{**inspected()[0], "RootFS": {"Layers": ["sha256:a"]}}]
    assert runtime_image.content_digest(fewer) != digest
    assert runtime_image.content_digest([]) == ""
    with pytest.raises(ValueError, match="no layers"):
        runtime_image.content_digest([{"Id": "x", "RootFS": {}}])


# --- the probe, in a tree that looks like an image


def test_the_probe_reads_versions_without_importing(tmp_path: Path) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    (package / "version.py").write_text('__version__ = "1.2.0rc2"\n')
    for name, version in {"tensorrt_llm": "1.2.0rc2", "nixl_cu13": "0.7.1", "ai_dynamo": "0.7.0"}.items():
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "ucx_info": "# Library version: 1.19.0",
        "etcd": "etcd Version: 3.5.21\\nGo Version: go1.2.3",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\nprintf '{text}\\n'\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-S", "-"],
        input=Path(runtime_probe.__file__).read_text(),
        env={"PYTHONPATH": str(tmp_path), "PATH": f"{programs}:/usr/bin:/bin", "TRTLLM_USE_UCX_KVCACHE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert facts["tensorrt_llm"] == {"module": "1.2.0rc2", "distribution": "1.2.0rc2"}
    assert facts["nixl"] == {"nixl-cu13": "0.7.1"}
    assert (facts["dynamo"], facts["ucx"], facts["etcd"], facts["nats"]) == ("0.7.0", "1.19.0", "3.5.21", "")
    assert facts["environment"] == {"TRTLLM_USE_UCX_KVCACHE": "1"}


def compiled(target: Path, source: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)


def test_the_probe_finds_a_wrapper_that_asks_for_another_nixl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (
        "_ZN12nixlDescListI13nixlBasicDescEC1ERK10nixl_mem_tb",
        "_ZN12nixlDescListI13nixlBasicDescEC1ERK10nixl_mem_t",
    )
    wrapper, library = tmp_path / "libs/libtensorrt_llm_nixl_wrapper.so", tmp_path / "nixl/libnixl.so.1"
    monkeypatch.setattr(runtime_probe, "library_roots", lambda: [tmp_path])
    compiled(library, f"void {new}(void) {{}}\n")
    compiled(wrapper, f"void {new}(void);\nvoid w(void) {{ {new}(); }}\n")
    assert runtime_probe.nixl_abi() == {"copies": [str(library)], "wrappers": [str(wrapper)], "missing": []}
    compiled(wrapper, f"void {old}(void);\nvoid w(void) {{ {old}(); }}\n")
    assert runtime_probe.nixl_abi()["missing"] == [old]


# --- the build's progress

BUILDKIT = """\
#5 [internal] load build context
#5 DONE 0.0s
#7 [runtime  3/12] RUN apt-get update
#7 CACHED
#9 [runtime  4/12] RUN uv pip install torch
#9 12.31 Downloading torch (800.0MB)
"""


def test_progress_says_the_steps_done_the_step_at_work_and_the_last_line() -> None:
    line = build_job.progress(BUILDKIT, 754)
    assert line == (
        "12 min 34 s, 2 steps done, [runtime  4/12] RUN uv pip install torch, last line: Downloading torch (800.0MB)"
    )
    older = build_job.progress("Step 3/10 : COPY a b\n ---> 0123456789ab\nStep 4/10 : RUN x\n", 5)
    assert older == "0 min 05 s, 1 steps done, [4/10] RUN x, last line: Step 4/10 : RUN x"


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    return ["--state", str(tmp_path / "state"), "--log", str(tmp_path / "log"), "--cwd", str(tmp_path)]


def test_a_job_tells_how_it_ended_and_keeps_its_log(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_job.main(["watch", *job]) == build_job.NOT_THERE
    assert build_job.main(["run", *job, "--", "sh", "-c", "echo one; exit 7"]) == 7
    capsys.readouterr()
    assert build_job.main(["watch", *job]) == build_job.FAILED
    shown = capsys.readouterr().out
    assert shown.startswith("progress: ")
    assert "ended with 7" in shown
    assert shown.endswith("one\n")
    assert (tmp_path / "log").read_text().splitlines()[1] == "one"
    assert build_job.main(["run", *job, "--", "true"]) == 0
    assert build_job.main(["watch", *job]) == 0


def test_a_job_that_runs_is_seen_and_one_that_was_killed_is_not_waited_for(job: list[str]) -> None:
    # By itself, as on a build host: beside it lie modules of the names of the standard library's.
    script = Path(job[5]) / "build_job.py"
    shutil.copy(build_job.__file__, script)
    command = [
        sys.executable,
        str(script),
        "run",
        *job,
        "--",
        "sh",
        "-c",
        "echo begun; exec tail --pid=$PPID -f /dev/null",
    ]
    state = Path(job[1])
    with subprocess.Popen(command) as process:
        while not (state / "pid").is_file() or "\nbegun" not in build_job.tail(Path(job[3])):
            assert process.poll() is None
        assert build_job.main(["watch", *job]) == build_job.RUNNING
        process.kill()
    assert build_job.main(["watch", *job]) == build_job.NOT_THERE


def test_a_job_that_was_just_started_is_waited_for(job: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    state = Path(job[1])
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert build_job.run(state, Path(job[3]), Path(job[5]), ["true"]) == 0

    monkeypatch.setattr(build_job.time, "sleep", nap)
    assert build_job.main(["watch", *job, "--begun"]) == 0
    assert len(naps) == 1


# --- the stand-in of the source has upstream's interface


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("source") / "dynamo"
    dynamo_source.make(tree)
    return tree


def build_sh(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "container/build.sh", "--dry-run", *words]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def test_the_script_takes_the_plan_and_builds_in_two_steps(source: Path) -> None:
    done = build_sh(source, *plan()["argv"][2:])
    assert done.returncode == 0, done.stderr
    first, second = [line for line in done.stdout.splitlines() if line.startswith("docker")]
    assert "--tag dynamo-base:v0.7.0.post1-trtllm" in first
    assert "--target runtime" in second
    assert "DYNAMO_BASE_IMAGE=dynamo-base:v0.7.0.post1-trtllm" in second
    assert "TENSORRTLLM_PIP_WHEEL=tensorrt-llm==1.2.0rc3" in second
    assert f"--tag {plan()['candidate']}" in second
    assert "latest" not in second


@pytest.mark.parametrize("name", [name for name in runtime_image.OPTIONS if name != "tensorrtllm-git-url"])
def test_the_script_takes_every_option_that_the_role_lets_through(source: Path, name: str) -> None:
    words = [f"--{name}", {"framework": "trtllm"}.get(name, "x")] if runtime_image.OPTIONS[name] else [f"--{name}"]
    done = build_sh(source, "--framework", "trtllm", *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [["--release-build"], ["--tensorrtllm-pip-wheel", "a", "--tensorrtllm-pip-wheel-dir", "b"]]
)
def test_the_script_ends_with_what_upstreams_ends_with(source: Path, words: list[str]) -> None:
    assert build_sh(source, "--framework", "trtllm", *words).returncode == 1


def test_each_way_to_ignore_the_flag_is_what_it_says(tmp_path: Path) -> None:
    for name in ("hard-coded", "ignored"):
        dynamo_source.make(tmp_path / name, wheel_flag=name)
        dockerfile, script = (
            (tmp_path / name / "container" / file).read_text() for file in ("Dockerfile.trtllm", "build.sh")
        )
        seen = told(runtime_image.tree_problems(dockerfile, script, FLAGS["tensorrtllm-pip-wheel"], "0" * 40, ""))
        assert bool(seen) is (name == "hard-coded")
        assert (
            "TENSORRTLLM_PIP_WHEEL=tensorrt-llm==1.2.0rc2" in build_sh(tmp_path / name, *plan()["argv"][2:]).stdout
        ) is (name == "ignored")


def test_the_script_needs_a_git_checkout(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "container", tmp_path / "container")
    done = subprocess.run(
        ["bash", "container/build.sh", "--dry-run", "--framework", "trtllm"],
        cwd=tmp_path, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
