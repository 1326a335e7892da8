"""The 51 checks of a GPU host: what was found, what is wanted, how to mend it.

`evaluate` judges facts (what `probe` read) by a plan (what the inventory wants of this host, see `plan`). A check is a
small pure function; it says `skip` with the reason where the question does not arise or the facts do not answer it.
Standard library only, for Python >= 3.9: it also runs on a host without Ansible.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Facts = Mapping[str, Any]
Plan = Mapping[str, Any]
STAGES = ("bare", "provisioned", "image", "serving")
VERDICTS = ("ok", "warn", "fail", "skip")
# Dynamo lists the first two; the others run the same containers.
LISTED = {("ubuntu", "22.04"), ("ubuntu", "24.04")}
KNOWN = {("debian", "12"), ("rhel", "9"), ("rocky", "9"), ("almalinux", "9"), ("centos", "9")}
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # compared with, never bound to
SIGNERS = ("Canonical", "Red Hat", "Rocky", "Debian Secure Boot", "NVIDIA")
NOT_GPU = "not a GPU host"
NEEDS_IMAGE = "needs the runtime image: give its reference (--image, or doctor_image)"


@dataclass(frozen=True)
class Result:
    """What a check found out. `stage` and `mended_by` say when it can be right, and which Ansible role makes it so."""

    number: int
    id: str
    title: str
    verdict: str
    found: str
    wanted: str
    fix: str
    stage: str
    mended_by: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What the function of a check says; empty fields are filled in from the check."""

    verdict: str
    found: str
    wanted: str = ""
    fix: str = ""
    stage: str = ""


@dataclass(frozen=True)
class Check:
    """One check: its severity when it does not hold, and for which hosts it is meant."""

    number: int
    id: str
    title: str
    severity: str
    stage: str
    mended_by: str
    gpu_only: bool
    function: Callable[[Facts, Plan], Outcome]


CHECKS: list[Check] = []


def check(
    number: int, name: str, title: str, severity: str, stage: str, *, mended_by: str = "", gpu_only: bool = True
) -> Callable[[Callable[[Facts, Plan], Outcome]], Callable[[Facts, Plan], Outcome]]:
    """Enter a function as a check."""

    def enter(function: Callable[[Facts, Plan], Outcome]) -> Callable[[Facts, Plan], Outcome]:
        CHECKS.append(Check(number, name, title, severity, stage, mended_by, gpu_only, function))
        return function

    return enter


def ok(found: object) -> Outcome:
    """Say that it holds."""
    return Outcome("ok", str(found))


def skip(reason: str) -> Outcome:
    """Say why it cannot or need not be judged."""
    return Outcome("skip", reason)


def bad(found: object, wanted: object, fix: str, *, verdict: str = "", stage: str = "") -> Outcome:
    """Say that it does not hold; the verdict is the check's severity unless given."""
    return Outcome(verdict, str(found), str(wanted), fix, stage)


def version(text: str | None) -> tuple[int, ...]:
    """Return the numbers of a version, to compare by."""
    return tuple(int(part) for part in re.findall(r"\d+", (text or "").split("-")[0].split("+")[0]))


def listed(values: Iterable[object]) -> str:
    """Return values separated by commas, or `none`."""
    return ", ".join(str(value) for value in values) or "none"


def evaluate(facts: Facts, plan: Plan, stages: Sequence[str] = (), ids: Sequence[str] = ()) -> list[Result]:
    """Return the results of all checks in order, or of those with one of `ids` whose result is of one of `stages`."""
    if unknown := set(ids) - {entry.id for entry in CHECKS}:
        raise ValueError(f"no such check: {', '.join(sorted(unknown))}")
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    results = [judge(entry, facts, plan) for entry in CHECKS if not ids or entry.id in ids]
    return [result for result in results if not stages or result.stage in stages]


def judge(entry: Check, facts: Facts, plan: Plan) -> Result:
    """Return the result of one check."""
    said = skip(NOT_GPU) if entry.gpu_only and not plan.get("gpu_host") else entry.function(facts, plan)
    stage, fix = said.stage or entry.stage, said.fix
    if fix and stage != "bare" and entry.mended_by in plan.get("unmanaged", ()):
        # Nothing of the deployment will mend it: it is as good as known on the bare host.
        stage, fix = "bare", f"{fix}; {entry.mended_by}__manage is off for this host"
    return Result(
        number=entry.number,
        id=entry.id,
        title=entry.title,
        verdict=said.verdict or entry.severity,
        found=said.found,
        wanted=said.wanted,
        fix=fix,
        stage=stage,
        # What is known to be wrong on the bare host is not mended by a role.
        mended_by=entry.mended_by if stage == entry.stage else "",
    )


def unreachable(host: str, reason: str) -> Result:
    """Return the one result of a host that could not be asked."""
    return Result(
        0,
        "reachable",
        "the host answers",
        "fail",
        reason or "no answer",
        "an answer over Ansible's connection",
        f"try `ansible -m ansible.builtin.ping {host}`; correct ansible_host, ansible_user or the key",
        "bare",
        "",
    )


def worst(results: Iterable[Result]) -> int:
    """Return the exit status: 0 all right, 1 warnings, 2 failures."""
    verdicts = {result.verdict for result in results}
    return 2 if "fail" in verdicts else 1 if "warn" in verdicts else 0


# --- 1 to 16: the machine, its driver, its GPUs -----------------------------------------------------------------


@check(1, "os", "operating system", "fail", "bare", gpu_only=False)
def _os(facts: Facts, plan: Plan) -> Outcome:
    """Ubuntu 22.04 or 24.04, Debian 12, RHEL or Rocky 9; x86_64, on Ubuntu 24.04 aarch64 too (`/etc/os-release`)."""
    about = facts["os"]
    name = f"{about['id'] or 'unknown'} {about['version']} {about['arch']}".strip()
    release = (about["id"], about["version"] if about["id"] == "ubuntu" else about["version"].split(".")[0])
    arches = ("x86_64", "aarch64") if release == ("ubuntu", "24.04") else ("x86_64",)
    wanted = "Ubuntu 22.04 or 24.04, Debian 12, RHEL or Rocky 9, on x86_64 (Ubuntu 24.04 on aarch64 too)"
    if release in LISTED | KNOWN and about["arch"] in arches:
        return ok(name)
    verdict = "warn" if plan.get("allow_unlisted_os") else ""
    return bad(name, wanted, "install one of these; allow_unlisted_os: true tries it with this one", verdict=verdict)


@check(2, "gpus_on_pci", "GPUs on the PCI bus", "fail", "bare")
def _gpus_on_pci(facts: Facts, plan: Plan) -> Outcome:
    """At least `gpu_count` NVIDIA controllers on the PCI bus; no driver is needed to see them."""
    seen, wanted = len(facts["pci"]["gpus"]), plan["gpu_count"]
    running = len(facts["driver"]["nvidia_smi"]["gpus"])
    if seen >= wanted:
        return ok(seen)
    # A sandbox may hide the bus from a host whose GPUs work.
    if running >= wanted:
        return ok(f"{seen}, while nvidia-smi lists {running}")
    fix = "reseat the cards; BIOS: Above 4G Decoding on; a virtual machine: pass them through"
    return bad(seen, f"{wanted} (gpu_count)", f"{fix}; or lower gpu_count")


@check(3, "driver_version", "driver version", "fail", "provisioned", mended_by="gpu_driver")
def _driver_version(facts: Facts, plan: Plan) -> Outcome:
    """The loaded module is at least `versions.gpu.driver_minimum`, which CUDA 13 in the image needs."""
    loaded, least = facts["driver"]["loaded"], plan["driver_minimum"]
    if loaded and version(loaded) >= version(least):
        return ok(loaded)
    found = f"{loaded} is loaded" if loaded else "no NVIDIA driver is loaded"
    return bad(
        found,
        f"{least} or newer: containers with CUDA 13 do not start on an older one",
        "run the Ansible role gpu_driver (nox -s deploy)",
    )


@check(4, "driver_equal", "one version of the driver", "fail", "provisioned", mended_by="gpu_driver")
def _driver_equal(facts: Facts, _plan: Plan) -> Outcome:
    """Loaded module, module on disk and libnvidia-ml are of one version; if not, nothing new starts until a reboot."""
    driver = facts["driver"]
    names = {"loaded": "loaded", "on_disk": "module on disk", "library": "library"}
    found = {label: driver[key] for key, label in names.items() if driver[key]}
    text = ", ".join(f"{label} {value}" for label, value in found.items())
    if not found:
        return skip("there is no driver")
    if not driver["loaded"]:
        return bad(f"{text}, none loaded", "the module loaded", "modprobe nvidia; see what dmesg says; reboot")
    if len(set(found.values())) == 1 and driver["library"]:
        return ok(text)
    if not driver["library"] and len(set(found.values())) == 1 and driver["nvidia_smi"]["rc"] == 0:
        return ok(f"{text}, and nvidia-smi works")
    if not driver["library"]:
        return bad(
            f"{text}, no libnvidia-ml", "the library of the same version", "install the driver's compute libraries"
        )
    return bad(
        text,
        "the same version three times: the files were changed under a loaded module",
        "drain the host and reboot it",
    )


@check(5, "open_modules", "open kernel modules", "warn", "provisioned", mended_by="gpu_driver")
def _open_modules(facts: Facts, plan: Plan) -> Outcome:
    """The kernel modules are the open ones: DMA-BUF and Blackwell need them."""
    flavour = facts["driver"]["flavour"]
    if not flavour:
        return skip("there is no driver")
    if flavour == "open":
        return ok("open")
    # Without peermem there is no other way for a network adapter to reach GPU memory.
    needed = plan["fabric"]["rdma"] and not facts["rdma"]["nv_mem"]
    return bad(
        "proprietary",
        "open: DMA-BUF and Blackwell need it",
        "install the open flavour, or use nvidia-peermem",
        verdict="fail" if needed else "",
    )


@check(6, "nvidia_smi", "nvidia-smi lists the GPUs", "fail", "provisioned", mended_by="gpu_driver")
def _nvidia_smi(facts: Facts, plan: Plan) -> Outcome:
    """nvidia-smi ends with 0 and lists `gpu_count` GPUs; its failures (9, 12, 18) have a remedy each."""
    smi, wanted = facts["driver"]["nvidia_smi"], plan["gpu_count"]
    status, count = smi["rc"], len(smi["gpus"])
    if status is None:
        return bad("nvidia-smi is not installed", f"{wanted} GPUs", "run the Ansible role gpu_driver (nox -s deploy)")
    if status != 0:
        said = f"status {status}: {' '.join(smi['text'].split())[:160]}"
        return bad(said, f"{wanted} GPUs", _smi_fix(status, smi["text"]))
    if count < wanted:
        fix = "look for Xid lines in dmesg; reseat, or lower gpu_count"
        return bad(f"{count} GPUs", f"{wanted} (gpu_count)", fix, stage="bare")
    if count > wanted:
        fix = "raise gpu_count, so that the plan knows them"
        return bad(f"{count} GPUs", f"{wanted} (gpu_count)", fix, verdict="warn", stage="bare")
    return ok(f"{count} x {smi['gpus'][0]['name']}")


def _smi_fix(status: int, text: str) -> str:
    if "mismatch" in text or status == 18:
        return "drain the host and reboot it: the library is not of the loaded module's version"
    if "libnvidia-ml" in text or status == 12:
        return "install the driver's libraries (libnvidia-compute, libnvidia-ml)"
    if "communicate" in text or status == 9:
        return "the module is not loaded: modprobe nvidia, and see checks 7 (nouveau), 8 (Secure Boot) and 9 (headers)"
    if status == 124:
        return "a GPU hangs: look for Xid lines in dmesg, and power-cycle the host"
    return "look at dmesg; reinstall the driver"


@check(7, "nouveau", "nouveau is not loaded", "fail", "provisioned", mended_by="gpu_driver")
def _nouveau(facts: Facts, _plan: Plan) -> Outcome:
    """The module nouveau is not loaded: it keeps NVIDIA's from the cards."""
    if not facts["driver"]["nouveau"]:
        return ok("not loaded")
    return bad("loaded", "not loaded", "blacklist nouveau, rebuild the initramfs, reboot")


@check(8, "secure_boot", "Secure Boot lets the driver in", "fail", "bare")
def _secure_boot(facts: Facts, plan: Plan) -> Outcome:
    """Secure Boot is off, or the module is signed by a key that the firmware knows."""
    driver = facts["driver"]
    if driver["secure_boot"] is None:
        return skip("the firmware does not tell")
    if not driver["secure_boot"]:
        return ok("off")
    signer = driver["signer"] or ""
    if driver["loaded"] or driver["key_enrolled"] or signer.startswith(SIGNERS):
        return ok(f"on, and the module is accepted (signed by {signer or 'an enrolled key'})")
    if plan.get("driver_signed"):
        return ok("on; the inventory chooses signed modules")
    found = f"on, and the key of the module ({signer or 'made by DKMS'}) is not enrolled"
    return bad(
        found,
        "off, or a module signed by an enrolled key",
        "enroll it: mokutil --import /var/lib/dkms/mok.pub, confirmed at the console; or take the distribution's "
        "signed modules; or turn Secure Boot off",
    )


@check(9, "headers", "headers and DKMS of the running kernel", "fail", "provisioned", mended_by="gpu_driver")
def _headers(facts: Facts, _plan: Plan) -> Outcome:
    """Headers of the running kernel are there and DKMS has built for it, or the module is a prebuilt one."""
    driver, kernel = facts["driver"], facts["os"]["kernel"]
    lines = [line for line in driver["dkms"] if line.startswith("nvidia")]
    here = [line for line in lines if kernel in line]
    if any("installed" in line for line in here) and driver["headers"]:
        return ok(here[0])
    if not lines and driver["loaded"]:
        return ok("the module is a prebuilt one")
    if not driver["headers"]:
        return bad(
            f"no headers of {kernel}",
            "headers of the running kernel",
            f"install the headers of {kernel} (not of the newest kernel), then dkms autoinstall",
        )
    if not lines:
        return skip("there is no driver")
    found = here[0] if here else f"built for another kernel: {lines[0]}"
    return bad(found, f"nvidia installed for {kernel}", "dkms autoinstall; its log is in /var/lib/dkms/nvidia")


@check(10, "reboot_pending", "no reboot pending", "warn", "bare", gpu_only=False)
def _reboot_pending(facts: Facts, _plan: Plan) -> Outcome:
    """No package asks for a reboot, and the newest installed kernel is the running one."""
    if not facts["reboot_required"]:
        return ok("none")
    newest, kernel = facts["os"]["newest_kernel"], facts["os"]["kernel"]
    found = f"{kernel} runs, {newest} is installed" if newest and newest != kernel else "the packages ask for one"
    return bad(found, "none", "reboot before the driver is installed, so that it is built for the kernel that will run")


@check(11, "upgrades", "the driver does not change by itself", "warn", "provisioned", mended_by="host_tuning")
def _upgrades(facts: Facts, _plan: Plan) -> Outcome:
    """The driver's branch is pinned, unattended-upgrades leaves nvidia packages alone, and no .run file was used."""
    packages = facts["packages"]
    if not packages["manager"]:
        return skip("neither apt nor dnf")
    wrong = []
    if packages["run_file_install"]:
        return bad(
            "the driver of a .run file (nvidia-uninstall exists)",
            "packages only",
            "nvidia-uninstall, then run the Ansible role gpu_driver",
            verdict="fail",
            stage="bare",
        )
    if not packages["pin_file"]:
        wrong.append("the branch is not pinned")
    automatic = packages["manager"] == "apt" and "unattended-upgrades" in packages["installed"]
    if automatic and not any("nvidia" in pattern for pattern in packages["blacklist"]):
        wrong.append("unattended-upgrades may replace nvidia packages")
    if not wrong:
        return ok("pinned")
    return bad(
        "; ".join(wrong),
        "the branch pinned, nvidia packages left alone",
        "run the Ansible roles gpu_driver and host_tuning: an upgrade under a loaded module breaks every new "
        "container until a reboot",
    )


@check(
    12, "gpu_health", "GPUs: persistence, memory errors, compute mode", "warn", "provisioned", mended_by="gpu_driver"
)
def _gpu_health(facts: Facts, _plan: Plan) -> Outcome:
    """Persistence mode on, no uncorrected memory errors, compute mode Default."""
    gpus = facts["driver"]["nvidia_smi"]["gpus"]
    if not gpus:
        return skip("nvidia-smi lists no GPU")
    wrong, fixes, stage = [], [], ""
    for gpu in gpus:
        if gpu["persistence"] not in (None, "Enabled"):
            wrong.append(f"GPU {gpu['index']} persistence {gpu['persistence']}")
            fixes.append("start nvidia-persistenced")
        if gpu["ecc"]:
            wrong.append(f"GPU {gpu['index']} {gpu['ecc']} uncorrected memory errors")
            fixes.append("reset the GPU; have it replaced if the errors come back")
            stage = "bare"
        if gpu["compute_mode"] not in (None, "Default"):
            wrong.append(f"GPU {gpu['index']} compute mode {gpu['compute_mode']}")
            fixes.append("nvidia-smi -c DEFAULT")
            stage = "bare"
    if not wrong:
        return ok("all well")
    wanted = "persistence Enabled, no uncorrected errors, mode Default"
    return bad("; ".join(wrong), wanted, "; ".join(dict.fromkeys(fixes)), stage=stage)


@check(13, "fabric_manager", "fabric manager of the driver's version", "fail", "provisioned", mended_by="gpu_driver")
def _fabric_manager(facts: Facts, plan: Plan) -> Outcome:
    """With NVSwitch: the fabric manager runs and is exactly of the driver's version."""
    if not facts["pci"]["nvswitches"]:
        return skip("no NVSwitch")
    manager, loaded = facts["fabric_manager"], facts["driver"]["loaded"]
    if not manager["unit"] and not manager["version"]:
        return bad(
            "not installed",
            f"nvidia-fabricmanager {loaded or plan['driver']}, active",
            "run the Ansible role gpu_driver: without it CUDA fails with 802, system not yet initialized",
        )
    found = f"{manager['version'] or 'unknown version'}, {manager['state'] or 'no unit'}"
    if manager["version"] and loaded and manager["version"] != loaded:
        return bad(
            found, f"exactly {loaded}, the driver's version", f"install nvidia-fabricmanager {loaded}, and restart it"
        )
    if manager["state"] != "active":
        return bad(
            found, "active", "systemctl restart nvidia-fabricmanager; journalctl -u nvidia-fabricmanager says why"
        )
    return ok(found)


@check(14, "nvlink_fabric", "NVLink fabric is complete", "fail", "provisioned", mended_by="gpu_driver")
def _nvlink_fabric(facts: Facts, _plan: Plan) -> Outcome:
    """With NVSwitch: every GPU says Completed/Success for its part of the fabric."""
    if not facts["pci"]["nvswitches"]:
        return skip("no NVSwitch")
    states = [
        (gpu["index"], gpu["fabric_state"], gpu["fabric_status"]) for gpu in facts["driver"]["nvidia_smi"]["gpus"]
    ]
    if not states or all(state is None for _, state, _ in states):
        return skip("nvidia-smi does not tell")
    wrong = [f"GPU {i} {state}/{status}" for i, state, status in states if (state, status) != ("Completed", "Success")]
    if not wrong:
        return ok("Completed/Success")
    return bad(
        "; ".join(wrong),
        "Completed/Success on each GPU",
        "mend the fabric manager (check 13); then reset the GPUs or reboot",
    )


@check(15, "p2p", "GPUs reach each other's memory", "warn", "provisioned")
def _p2p(facts: Facts, plan: Plan) -> Outcome:
    """Each GPU reaches every other (`nvidia-smi topo -p2p r`), over NVLink where the fabric promises it."""
    smi, count = facts["driver"]["nvidia_smi"], plan["gpu_count"]
    if count < 2:
        return skip("one GPU")
    if not smi["p2p"]:
        return skip("nvidia-smi shows no matrix")
    blocked = [
        f"{one}-{other} {state}"
        for one, row in smi["p2p"].items()
        for other, state in row.items()
        if one < other and state not in ("OK", "X")
    ]
    if blocked:
        return bad(
            listed(blocked[:4]) + (" ..." if len(blocked) > 4 else ""),
            "OK between all",
            "ACS or IOMMU in the way (check 33), a virtual machine without P2P, or cards that cannot",
            verdict="fail" if plan["fabric"]["ipc"] else "",
        )
    links = {smi["topology"].get(f"GPU{i}", {}).get(f"GPU{j}", "") for i in range(count) for j in range(i)}
    slow = sorted(link for link in links if link and not link.startswith("NV"))
    if plan["fabric"]["nvlink"] and slow:
        return bad(
            f"connected by {listed(slow)}",
            f"NVLink, as kv_fabric {plan['fabric']['name']} promises",
            "kv_fabric: pcie_single, or check the NVLink bridge",
            verdict="fail",
        )
    return ok(f"OK, connected by {listed(sorted(link for link in links if link))}")


@check(16, "mig", "MIG as planned", "warn", "provisioned")
def _mig(facts: Facts, plan: Plan) -> Outcome:
    """MIG is as the inventory has it (`gpu_mig`, Disabled unless set)."""
    gpus = facts["driver"]["nvidia_smi"]["gpus"]
    if not gpus:
        return skip("nvidia-smi lists no GPU")
    states = {gpu["index"]: gpu["mig"] or "Disabled" for gpu in gpus}
    wrong = [f"GPU {index} {state}" for index, state in states.items() if state != plan["mig"]]
    if not wrong:
        return ok(plan["mig"])
    return bad(
        listed(wrong),
        plan["mig"],
        f"nvidia-smi -mig {0 if plan['mig'] == 'Disabled' else 1}: MIG instances cannot share memory by CUDA IPC",
    )


# --- 17 to 26: containers and their space -----------------------------------------------------------------------


@check(17, "docker", "container engine", "fail", "provisioned", mended_by="container_engine", gpu_only=False)
def _docker(facts: Facts, plan: Plan) -> Outcome:
    """Docker answers and is new enough; newer still for `gpu_request: cdi`."""
    docker = facts["docker"]
    least = plan["docker_minimum"] if plan["gpu_host"] else "20.10"
    if not docker["installed"]:
        return bad("Docker is not installed", f"Docker {least} or newer", "run the Ansible role container_engine")
    if not docker["version"]:
        return bad(
            "the Docker daemon does not answer",
            f"Docker {least} or newer",
            "systemctl status docker; or this user may not ask it: become root",
        )
    if version(docker["version"]) < version(least):
        return bad(docker["version"], f"{least} or newer", "upgrade Docker (docker-ce)")
    if plan["gpu_host"] and plan["gpu_request"] == "cdi" and version(docker["version"]) < version(plan["docker_cdi"]):
        return bad(
            docker["version"],
            f"{plan['docker_cdi']} or newer, for gpu_request: cdi",
            "upgrade Docker, or gpu_request: runtime",
        )
    return ok(docker["version"])


@check(18, "nvidia_runtime", "Docker knows the nvidia runtime", "fail", "provisioned", mended_by="nvidia_toolkit")
def _nvidia_runtime(facts: Facts, plan: Plan) -> Outcome:
    """Docker lists the runtime nvidia, or GPUs are asked for by CDI."""
    docker = facts["docker"]
    if not docker["version"]:
        return skip("no Docker daemon answers (check 17)")
    if "nvidia" in docker["runtimes"]:
        return ok("nvidia")
    if _uses_cdi(facts, plan):
        return ok("CDI is used instead")
    return bad(
        f"runtimes {listed(docker['runtimes'])}",
        "nvidia",
        "run the Ansible role nvidia_toolkit; a reload does not do, Docker must be restarted",
    )


@check(19, "daemon_json", "daemon.json is sound", "fail", "bare", gpu_only=False)
def _daemon_json(facts: Facts, _plan: Plan) -> Outcome:
    """/etc/docker/daemon.json is valid, and sets nothing that dockerd's command line sets too."""
    docker = facts["docker"]
    if docker["daemon_json_error"]:
        return bad(
            f"broken: {docker['daemon_json_error']}",
            "one JSON object",
            "mend /etc/docker/daemon.json by hand: nothing overwrites it",
        )
    if docker["daemon_json"] is None:
        return ok("there is none")
    flags = {re.sub(r"^-+", "", flag): flag for flag in docker["unit_flags"]}
    # On the command line a repeated option is singular.
    plural = {"exec-opts": "exec-opt", "runtimes": "add-runtime", "hosts": "host", "labels": "label"}
    twice = [key for key in docker["daemon_json"] if key in flags or plural.get(key) in flags]
    if "hosts" in docker["daemon_json"] and "H" in flags and "hosts" not in twice:
        twice.append("hosts")
    if not twice:
        return ok("valid")
    return bad(
        f"{listed(twice)}: both in daemon.json and on dockerd's command line",
        "each setting in one place",
        "take it out of the unit's ExecStart or of daemon.json: the daemon refuses to start",
    )


@check(20, "toolkit", "container toolkit", "warn", "provisioned", mended_by="nvidia_toolkit")
def _toolkit(facts: Facts, plan: Plan) -> Outcome:
    """nvidia-ctk is new enough, and its four packages are of one version."""
    toolkit = facts["toolkit"]
    if not toolkit["version"]:
        return bad(
            "nvidia-ctk is not installed",
            f"{plan['toolkit_minimum']} or newer",
            "run the Ansible role nvidia_toolkit",
            verdict="fail",
        )
    versions = set(toolkit["packages"].values())
    if len(versions) > 1:
        text = ", ".join(f"{name} {value}" for name, value in sorted(toolkit["packages"].items()))
        return bad(text, "one version of all four packages", "upgrade them together, pinned to one version")
    if version(toolkit["version"]) < version(plan["toolkit_minimum"]):
        return bad(
            toolkit["version"],
            f"{plan['toolkit_minimum']} or newer: older ones let containers escape",
            "upgrade the four packages together; drain the host first",
        )
    return ok(toolkit["version"])


@check(21, "cdi", "CDI devices", "fail", "provisioned", mended_by="nvidia_toolkit")
def _cdi(facts: Facts, plan: Plan) -> Outcome:
    """With CDI: `nvidia.com/gpu=all` is listed, and no stale file stands beside the refreshed one."""
    if not _uses_cdi(facts, plan):
        return skip("GPUs are asked for by the nvidia runtime")
    if facts["toolkit"]["stale_cdi"]:
        return bad(
            "/etc/cdi/nvidia.yaml is stale: of another driver, or beside the refreshed one",
            "one CDI file",
            "delete /etc/cdi/nvidia.yaml, systemctl restart nvidia-cdi-refresh",
        )
    devices = facts["docker"]["cdi_devices"]
    if "nvidia.com/gpu=all" in devices:
        return ok(f"{len(devices)} devices")
    return bad(listed(devices), "nvidia.com/gpu=all", "systemctl restart nvidia-cdi-refresh; nvidia-ctk cdi list")


def _uses_cdi(facts: Facts, plan: Plan) -> bool:
    if plan["gpu_request"] != "auto":
        return bool(plan["gpu_request"] == "cdi")
    return bool(facts["docker"]["cdi"]) and version(facts["docker"]["version"]) >= version(plan["docker_cdi"])


def _image(facts: Facts) -> Mapping[str, Any] | Outcome:
    image = facts.get("image")
    if not image:
        return skip(NEEDS_IMAGE)
    if not image["present"]:
        return skip(f"the host does not have {image['ref']}")
    found: Mapping[str, Any] = image
    return found


@check(22, "container_gpus", "containers see the GPUs", "fail", "image", mended_by="nvidia_toolkit")
def _container_gpus(facts: Facts, plan: Plan) -> Outcome:
    """A container of the image sees `gpu_count` GPUs."""
    image = _image(facts)
    if isinstance(image, Outcome):
        return image
    gpus, wanted = image["gpus"], plan["gpu_count"]
    if gpus["rc"] == 0 and gpus["count"] >= wanted:
        return ok(gpus["count"])
    if gpus["rc"] == 0:
        return bad(f"{gpus['count']} GPUs", wanted, "see which GPUs the container is given, and check 6")
    text = " ".join(gpus["text"].split())
    return bad(text[-160:] or f"status {gpus['rc']}", f"{wanted} GPUs", _container_fix(text))


def _container_fix(text: str) -> str:
    if "could not select device driver" in text:
        return "install the container toolkit (role nvidia_toolkit); with CDI, Docker must be 25 or newer"
    if "Unknown runtime" in text or "unknown or invalid runtime" in text:
        return "register the nvidia runtime (role nvidia_toolkit) and restart Docker"
    if "Unknown Error" in text:
        return "recreate the container; use CDI, or the cgroupfs driver (check 23)"
    if "unresolvable CDI devices" in text:
        return "systemctl restart nvidia-cdi-refresh; delete a stale /etc/cdi/nvidia.yaml"
    if "Insufficient Permissions" in text:
        return "SELinux: --security-opt label=disable"
    return "nvidia-container-cli -k -d /dev/tty info tells what the toolkit sees"


@check(23, "daemon_reload", "GPUs outlast a systemd daemon-reload", "warn", "provisioned", mended_by="nvidia_toolkit")
def _daemon_reload(facts: Facts, plan: Plan) -> Outcome:
    """GPUs stay when systemd reloads: CDI, or the cgroupfs driver. Judged by the configuration; nothing is reloaded."""
    docker = facts["docker"]
    if not docker["version"]:
        return skip("no Docker daemon answers (check 17)")
    if docker["cgroup_driver"] != "systemd":
        return ok(f"cgroup driver {docker['cgroup_driver']}")
    running = [entry["name"] for entry in docker["containers"] if entry["gpus"] and not entry["cdi"]]
    if not running and _uses_cdi(facts, plan):
        return ok("CDI: Docker itself knows the devices")
    found = f"cgroup driver systemd, {'GPUs without CDI in ' + listed(running) if running else 'no CDI'}"
    return bad(
        found,
        "CDI, the devices named one by one, or the cgroupfs driver",
        "gpu_request: cdi, or native.cgroupdriver=cgroupfs: else a daemon-reload ends in `Failed to initialize "
        "NVML: Unknown Error`",
    )


@check(24, "memlock", "containers may lock memory", "warn", "provisioned", mended_by="host_tuning")
def _memlock(facts: Facts, plan: Plan) -> Outcome:
    """Memory may be locked without limit, in Docker's unit and in a container."""
    image = facts.get("image")
    seen = image["memlock"] if image and image["present"] else facts["limits"]["memlock"]
    where = "in a container" if image and image["present"] else "of Docker's unit"
    if seen in ("infinity", "unlimited", 2**64 - 1):
        return ok("unlimited")
    if seen is None:
        return skip("systemd does not tell")
    return bad(
        f"{seen} {where}",
        "unlimited: registering memory locks it",
        "LimitMEMLOCK=infinity in a drop-in of docker.service, restart Docker, ulimit memlock=-1 a container",
        verdict="fail" if plan["fabric"]["rdma"] else "",
    )


@check(25, "shm", "shared memory", "warn", "bare")
def _shm(facts: Facts, plan: Plan) -> Outcome:
    """Shared memory is large enough where containers share the host's."""
    size = facts["shm_mib"]
    if size is None:
        return skip("there is no /dev/shm")
    if plan["fabric"]["ipc_mode"] != "host":
        return skip("containers have their own, as the fabric's shm_size says")
    if size >= plan["shm_mib"]:
        return ok(f"{size} MiB")
    return bad(
        f"{size} MiB in /dev/shm",
        f"{plan['shm_mib']} MiB",
        "mount -o remount,size=80G /dev/shm (and in /etc/fstab), or a fabric with its own shm_size",
    )


@check(26, "disk", "disk space", "fail", "bare", gpu_only=False)
def _disk(facts: Facts, plan: Plan) -> Outcome:
    """Docker's directory and the model's have room for image and model (`doctor_disk_mib`)."""
    wanted, free = plan["disk_mib"], facts["disk"]
    known = {path: free[path] for path in wanted if free.get(path) is not None}
    if not known:
        return skip("no directory was asked for")
    # Two directories with the same free space lie on one file system, which must have room for both.
    sums: dict[int, int] = {}
    for path, mib in known.items():
        sums[mib] = sums.get(mib, 0) + wanted[path]
    short = [path for path, mib in known.items() if mib < sums[mib]]
    if not short:
        return ok(", ".join(f"{path} {mib} MiB free" for path, mib in known.items()))
    found = ", ".join(f"{path} {known[path]} MiB free" for path in short)
    return bad(
        found,
        f"{sums[known[short[0]]]} MiB for image and model",
        "free some, mount a larger file system there, or lower doctor_disk_mib",
    )


# --- 27 to 35: RDMA and the network -----------------------------------------------------------------------------


def _ports(facts: Facts, plan: Plan) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Return each wanted `device:port` with its facts, None for one that is not there."""
    have = {f"{device['name']}:{device['port']}": device for device in facts["rdma"]["devices"]}
    wanted = plan["net_devices"] or list(have)
    return [(name, have.get(name if ":" in name else f"{name}:1")) for name in wanted]


@check(27, "rdma_ports", "RDMA ports are up", "fail", "provisioned", mended_by="rdma")
def _rdma_ports(facts: Facts, plan: Plan) -> Outcome:
    """The RDMA ports that are used are ACTIVE, and user-space verbs are there."""
    if not plan["fabric"]["rdma"]:
        return skip(f"fabric {plan['fabric']['name']} uses no RDMA")
    ports = [(name, port) for name, port in _ports(facts, plan) if port]
    if not ports:
        return skip("there is no RDMA device (check 28)")
    down = [f"{name} {port['state']}" for name, port in ports if port["state"] != "ACTIVE"]
    if down:
        return bad(
            listed(down), "ACTIVE", "cable, subnet manager (InfiniBand) or link down: ibstat, ip link", stage="bare"
        )
    if not facts["rdma"]["uverbs"]:
        return bad("no /dev/infiniband/uverbs*", "user-space verbs", "modprobe ib_uverbs mlx5_ib; install rdma-core")
    return ok(listed(f"{name} ACTIVE" for name, _ in ports))


@check(28, "net_devices", "the planned network devices exist", "fail", "provisioned", mended_by="rdma")
def _net_devices(facts: Facts, plan: Plan) -> Outcome:
    """Each of `kv_net_devices`, and each interface the fabric names, exists."""
    fix = "UCX fails with `network device is not available`: correct kv_net_devices"
    if plan["fabric"]["rdma"]:
        have = [f"{device['name']}:{device['port']}" for device in facts["rdma"]["devices"]]
        missing = [name for name, port in _ports(facts, plan) if port is None]
        if have and not missing:
            return ok(listed(plan["net_devices"] or have))
        if not have and facts["pci"]["nics"]:
            return bad(
                "the adapters are on PCI, but have no RDMA driver",
                listed(plan["net_devices"]),
                "run the Ansible role rdma (mlx5_ib, rdma-core)",
            )
        if not have:
            return bad(
                "no RDMA device",
                listed(plan["net_devices"]) if plan["net_devices"] else "an RDMA adapter",
                "put the adapter in, or choose a kv_fabric without RDMA",
                stage="bare",
            )
        return bad(f"there are {listed(have)}", listed(missing), fix, stage="bare")
    names = [entry["name"] for entry in facts["net"]["interfaces"]]
    wanted = [name for name in (plan["interface"], *plan["ucx_interfaces"]) if name]
    missing = [name for name in wanted if name not in names]
    if missing:
        return bad(f"there are {listed(names)}", listed(missing), fix + " or kv_interface", stage="bare")
    return ok(listed(wanted)) if wanted else skip("none is named")


@check(29, "gid", "RoCE address (GID)", "fail", "provisioned")
def _gid(facts: Facts, plan: Plan) -> Outcome:
    """RoCE: the GID index that is used is of type RoCE v2 and has an address."""
    if not plan["fabric"]["rdma"]:
        return skip(f"fabric {plan['fabric']['name']} uses no RDMA")
    ports = [(name, port) for name, port in _ports(facts, plan) if port and port["link_layer"] == "Ethernet"]
    if not ports:
        return skip("no RoCE port is used")
    index = str(plan["gid_index"] or "")
    good, wrong = [], []
    for name, port in ports:
        v2 = sorted((int(i) for i, gid in port["gids"].items() if gid["type"] == "RoCE v2"), reverse=True)
        chosen = port["gids"].get(index)
        if not index.isdigit() and v2:
            good.append(f"{name} chooses among {listed(v2)}")
        elif chosen and chosen["type"] == "RoCE v2":
            good.append(f"{name} {index}")
        else:
            have = f"index {index} is {chosen['type'] if chosen else 'empty'}" if index else "no RoCE v2 address"
            wrong.append(f"{name}: {have}; RoCE v2 are {listed(v2)}")
    if wrong:
        return bad(
            "; ".join(wrong),
            "an index of type RoCE v2 with an address",
            "correct UCX_IB_GID_INDEX (show_gids lists them), or give the interface an address",
        )
    return ok(listed(good))


@check(30, "gpu_direct", "network adapters reach GPU memory", "fail", "provisioned", mended_by="rdma")
def _gpu_direct(facts: Facts, plan: Plan) -> Outcome:
    """RDMA: adapters reach GPU memory by DMA-BUF or nvidia-peermem, and no useless peermem hides DMA-BUF."""
    rdma = facts["rdma"]
    if not plan["fabric"]["rdma"]:
        return skip(f"fabric {plan['fabric']['name']} uses no RDMA")
    if rdma["peermem"] and not rdma["nv_mem"]:
        return bad(
            "nvidia_peermem is loaded but useless (no memory_peers/nv_mem)",
            "it works, or it is not loaded",
            "modprobe -r nvidia_peermem where DMA-BUF does it; else rebuild the driver after OFED: dkms remove and "
            "install nvidia",
        )
    if rdma["nv_mem"]:
        return ok("nvidia-peermem")
    if rdma["dmabuf"]:
        return ok("DMA-BUF")
    return bad(
        f"driver {facts['driver']['flavour'] or 'absent'}, kernel {facts['os']['kernel']}, no nvidia-peermem",
        "open modules with kernel 5.12 or newer, or OFED with nvidia-peermem",
        "install the open flavour of the driver; else data goes through host memory",
    )


@check(31, "ofed", "OFED and its kernel modules agree", "warn", "provisioned", mended_by="rdma")
def _ofed(facts: Facts, _plan: Plan) -> Outcome:
    """With OFED: its kernel modules are those of the running kernel."""
    rdma = facts["rdma"]
    if not rdma["ofed"]:
        return skip("the distribution's own RDMA stack is used")
    release = re.search(r"\d+\.\d+-[\d.]+\d", rdma["ofed"])
    modules = {value for value in (rdma["mlx5_core"], rdma["mlx5_core_on_disk"]) if value}
    wanted = release.group(0) if release else ""
    if modules and wanted and all(value.startswith(wanted) or wanted.startswith(value) for value in modules):
        return ok(rdma["ofed"])
    return bad(
        f"{rdma['ofed']}, mlx5_core {listed(sorted(modules)) if modules else 'of the kernel'}",
        f"mlx5_core {wanted or 'of the same release'}",
        "OFED's modules were not built for this kernel: dkms status, reinstall doca-ofed, reboot",
    )


@check(32, "gdrcopy", "GDRCopy", "warn", "provisioned", mended_by="gdrcopy")
def _gdrcopy(facts: Facts, plan: Plan) -> Outcome:
    """/dev/gdrdrv exists where GDRCopy is asked for."""
    gdrcopy = facts["gdrcopy"]
    if gdrcopy["device"]:
        return ok(f"gdrdrv {gdrcopy['module'] or ''}".strip())
    if not plan["gdrcopy"]:
        return skip("optional, and not asked for")
    found = "gdrdrv is loaded, without /dev/gdrdrv" if gdrcopy["module"] else "no /dev/gdrdrv"
    return bad(found, "/dev/gdrdrv", "run the Ansible role gdrcopy: gdrdrv must be built for the flavour of the driver")


@check(33, "acs", "no ACS or IOMMU between devices", "warn", "bare")
def _acs(facts: Facts, plan: Plan) -> Outcome:
    """Bare metal: no PCI bridge checks sources (ACS), and the IOMMU does not translate."""
    if facts["os"]["virtual"]:
        return skip("a virtual machine: its host decides")
    iommu, words = facts["iommu"], facts["iommu"]["cmdline"].split()
    fix = "BIOS: ACS off; else setpci -s BDF ECAP_ACS+0x6.w=0000 for each bridge at every boot"
    if iommu["acs_on"] and facts["os"]["arch"] == "x86_64":
        return bad(
            f"{iommu['acs_on']} PCI bridges check sources",
            "none: data goes through the root complex, slowly or wrong",
            fix,
            verdict="fail" if plan["fabric"]["rdma"] else "",
        )
    forced = any(word in words for word in ("intel_iommu=on", "amd_iommu=on")) or iommu["groups"]
    if forced and not {"iommu=pt", "iommu.passthrough=1"} & set(words):
        return bad(
            "the IOMMU translates (no iommu=pt)",
            "iommu=pt on the kernel's command line",
            "add iommu=pt to GRUB_CMDLINE_LINUX, update-grub, reboot",
        )
    if iommu["acs_on"] is None:
        return skip("only root may read the bridges' registers")
    return ok("off")


@check(34, "affinity", "GPUs and adapters are near each other", "warn", "bare")
def _affinity(facts: Facts, plan: Plan) -> Outcome:
    """RDMA: each GPU that is used has an adapter beside it (PIX, PXB or PHB; else the same NUMA node)."""
    if not plan["fabric"]["rdma"]:
        return skip(f"fabric {plan['fabric']['name']} uses no RDMA")
    ports = [(name, port) for name, port in _ports(facts, plan) if port]
    gpus = facts["pci"]["gpus"]
    if not ports or not gpus:
        return skip("no RDMA device, or no GPU")
    smi = facts["driver"]["nvidia_smi"]
    names = {device: nic for nic, device in smi["nics"].items()}
    nodes = {port["numa"] for _, port in ports}
    far = []
    for index in plan["gpus_used"] or range(len(gpus)):
        row = smi["topology"].get(f"GPU{index}", {})
        links = {row.get(names.get(port["name"], port["name"])) for _, port in ports} - {None}
        numa = gpus[index]["numa"] if index < len(gpus) else None
        if links and not links & {"PIX", "PXB", "PHB"}:
            far.append(f"GPU {index} {'/'.join(sorted(str(link) for link in links))}")
        elif not links and numa is not None and numa >= 0 and None not in nodes and numa not in nodes:
            far.append(f"GPU {index} on NUMA node {numa}, adapters on {listed(sorted(nodes))}")
    if not far:
        return ok("near")
    return bad(
        listed(far),
        "each GPU beside one of the adapters (PIX or PXB)",
        "add the adapter beside it to kv_net_devices, or give the worker another GPU",
    )


def _interface(facts: Facts, plan: Plan) -> Mapping[str, Any] | None:
    """Return the interface that KV peers use: the named one, else the one that has the host's address."""
    for entry in facts["net"]["interfaces"]:
        if entry["name"] == plan["interface"] or (
            not plan["interface"] and plan["address"] in (entry["addresses"] or ())
        ):
            found: Mapping[str, Any] = entry
            return found
    return None


@check(35, "mtu", "MTU equal on all hosts", "warn", "bare", gpu_only=False)
def _mtu(facts: Facts, plan: Plan) -> Outcome:
    """The interface to the peers has the MTU of `kv_mtu`, and of the other hosts."""
    interface = _interface(facts, plan)
    if interface is None:
        return skip("the interface of the host's address is not known")
    own, name = interface["mtu"], interface["name"]
    if plan["mtu"] and own != plan["mtu"]:
        return bad(
            f"{name} {own}", f"{plan['mtu']} (kv_mtu)", f"ip link set {name} mtu {plan['mtu']}, and make it lasting",
            verdict="fail",
        )  # fmt: skip
    # The odd one out is told, not all the others; where neither is the more common one, both are.
    peers = [mtu for mtu in plan["peer_mtu"].values() if mtu]
    if not plan["mtu"] and not peers:
        return skip("there is no other host to compare with")
    other = {host: mtu for host, mtu in sorted(plan["peer_mtu"].items()) if mtu and mtu != own}
    if len(other) >= len(peers) + 1 - len(other):
        found = ", ".join(f"{host} {mtu}" for host, mtu in list(other.items())[:3]) + (" ..." if len(other) > 3 else "")
        return bad(
            f"{name} {own}; {found}", "the same on all hosts", "set it alike: large transfers stall where it differs"
        )
    return ok(f"{name} {own}")


# --- 36 to 38: UCX, in the image --------------------------------------------------------------------------------


@check(36, "ucx", "UCX has the fabric's transports", "fail", "image")
def _ucx(facts: Facts, plan: Plan) -> Outcome:
    """ucx_info in the image, in the service's environment, has the fabric's transports and no complaint."""
    image = _image(facts)
    if isinstance(image, Outcome):
        return image
    ucx = image["ucx"]
    if ucx["complaints"]:
        return bad(
            ucx["complaints"][0][-200:],
            "no complaint of UCX about its environment",
            "correct the fabric's env: a device or transport that is not there, or a misspelt name",
        )
    if ucx["rc"] != 0:
        return bad(
            " ".join(ucx["text"].split())[-160:] or f"status {ucx['rc']}",
            "ucx_info -d answers",
            "is it the runtime image?",
        )
    # KV may go over any of them, but GPU memory within a host over cuda_ipc alone.
    promised = plan["fabric"]["transports"]
    missing = [name for name in promised if not _has_transport(name, ucx["transports"])]
    if "cuda_ipc" in missing or (missing and len(missing) == len(promised)):
        return bad(
            f"there are {listed(ucx['transports'])}",
            listed(missing),
            "give the container the devices (/dev/infiniband, GPUs), or choose another kv_fabric",
        )
    return ok(listed(ucx["transports"]))


def _has_transport(name: str, have: Sequence[str]) -> bool:
    """Say whether UCX has a transport, or one of those that an alias such as rc stands for."""
    return any(entry == name or entry.startswith(f"{name}_") for entry in have)


@check(37, "ucx_speed", "UCX moves GPU memory fast", "warn", "image")
def _ucx_speed(facts: Facts, plan: Plan) -> Outcome:
    """Two UCX processes in the image move GPU memory at half of what the fabric can do."""
    image = _image(facts)
    if isinstance(image, Outcome):
        return image
    measured, wanted = image["perf_mb_s"], plan["fabric"]["least_mb_s"]
    if measured is None and not image["perf_text"]:
        return skip("not measured (--perf, or doctor_perf)")
    if measured is None:
        return bad(image["perf_text"][-160:], f"{wanted} MB/s", "see check 36; the pair did not run")
    if measured >= wanted:
        return ok(f"{measured:.0f} MB/s")
    return bad(
        f"{measured:.0f} MB/s",
        f"{wanted} MB/s or more: half of what {plan['fabric']['name']} can do",
        "UCX takes another transport: run it with UCX_PROTO_INFO=y and compare with the fabric's transports",
    )


@check(38, "namespaces", "workers share namespaces", "fail", "serving")
def _namespaces(facts: Facts, plan: Plan) -> Outcome:
    """Running workers share the namespaces that the fabric asks for."""
    wanted = {"pid_mode": plan["fabric"]["pid_mode"], "ipc_mode": plan["fabric"]["ipc_mode"]}
    if "host" not in wanted.values():
        return skip(f"fabric {plan['fabric']['name']} needs none in common")
    running = [entry for entry in facts["docker"]["containers"] if entry["name"] in plan["worker_containers"]]
    if not running:
        return skip("no worker runs here")
    wrong = [
        f"{entry['name']} {key} {entry[key] or 'private'}"
        for entry in running
        for key, mode in wanted.items()
        if mode == "host" and entry[key] != "host" and not entry[key].startswith("container:")
    ]
    if not wrong:
        return ok(listed(entry["name"] for entry in running))
    return bad(
        "; ".join(wrong),
        "host, or one shared: CUDA IPC needs a pid to mean the same process on both sides",
        "recreate the workers (nox -s deploy)",
    )


# --- 39 to 45: addresses, ports, kernel settings, time ------------------------------------------------------------


@check(39, "interface", "the interface of KV peers has one address", "fail", "bare")
def _interface_address(facts: Facts, plan: Plan) -> Outcome:
    """The interface that KV peers use has exactly one IPv4 address; without one, the host has its `pdstack_address`."""
    names = list(dict.fromkeys(name for name in (plan["interface"], *plan["env_interfaces"]) if name))
    interfaces = {entry["name"]: entry for entry in facts["net"]["interfaces"]}
    for name in names:
        if name not in interfaces:
            return bad(f"there is no {name}; there are {listed(interfaces)}", name, "correct kv_interface")
        addresses = interfaces[name]["addresses"]
        if addresses is None:
            return skip("the host does not tell its addresses")
        usable = [text for text in addresses if _usable(text)]
        if len(usable) != 1:
            return bad(
                f"{name} has {listed(usable)}",
                "one IPv4 address that the peers reach",
                "give it one, or name another kv_interface",
            )
    if names:
        return ok(listed(names))
    if plan["fabric"]["scope"] == "host":
        return skip("the fabric does not leave the host")
    everywhere = [text for entry in interfaces.values() for text in entry["addresses"] or ()]
    if not _is_address(plan["address"]) or not everywhere:
        return skip("no interface is named, and the host's address is a name")
    if plan["address"] in everywhere:
        return ok(plan["address"])
    return bad(
        f"no interface has {plan['address']}",
        "the host's pdstack_address on one of its interfaces",
        "correct pdstack_address, or set kv_interface: TensorRT-LLM would choose an interface by itself",
    )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _usable(text: str) -> bool:
    address = ipaddress.ip_address(text.split("%")[0])
    return address.version == 4 and not address.is_link_local and not address.is_loopback


@check(40, "ports", "planned ports are free", "fail", "bare", gpu_only=False)
def _free_ports(facts: Facts, plan: Plan) -> Outcome:
    """No stranger listens on a port of the plan."""
    taken = []
    for use in plan["ports"]:
        for listener in facts["listeners"]:
            here = listener["address"] in (*EVERYWHERE, use["address"]) or not _is_address(use["address"])
            # What runs for this deployment gives its port up when it moves.
            if listener["port"] == use["port"] and here and listener["deployment"] != plan["deployment"]:
                taken.append(f"{use['port']} ({use['service']}) by {_holder(listener)}")
                break
    if not taken:
        return ok(f"{len(plan['ports'])} ports") if plan["ports"] else skip("none is planned")
    dcgm = "; 5555 is nv-hostengine of DCGM" if any(entry.startswith("5555 ") for entry in taken) else ""
    return bad(
        "; ".join(taken),
        "free, or held by this deployment",
        f"stop it, or change pdstack_ports or pdstack_port_offset{dcgm}",
    )


def _holder(listener: Mapping[str, Any]) -> str:
    if listener["container"]:
        return f"container {listener['container']}"
    return f"{listener['process'] or '?'} (pid {listener['pid']})" if listener["pid"] else "a process of another user"


@check(41, "reach", "the services can be reached", "fail", "bare", gpu_only=False)
def _reach(facts: Facts, _plan: Plan) -> Outcome:
    """etcd and NATS on other hosts answer, or refuse because they do not run yet; silence is a firewall."""
    said = facts["reach"]
    if not said:
        return skip("no other host is asked")
    wrong = [f"{target}: {answer}" for target, answer in said.items() if answer not in ("ok", "refused")]
    if wrong:
        return bad(
            "; ".join(wrong),
            "each host answers, be it with a refusal",
            "open the way: 2379 and 4222 to etcd and NATS; from workers to frontends the ports of "
            "ip_local_port_range as well, for the answers",
        )
    waiting = sum(answer == "refused" for answer in said.values())
    return ok(f"{len(said)} reached" + (f", {waiting} of them not listening yet" if waiting else ""))


def _ranges(text: str | None) -> list[range]:
    found = []
    for part in re.split(r"[,\s]+", text or ""):
        low, _, high = part.partition("-")
        if low.isdigit():
            found.append(range(int(low), int(high or low) + 1))
    return found


@check(
    42, "port_range", "planned ports are not handed out", "warn", "provisioned", mended_by="host_tuning", gpu_only=False
)
def _port_range(facts: Facts, plan: Plan) -> Outcome:
    """Planned ports are outside of ip_local_port_range, or reserved."""
    handed = (facts["sysctl"]["net.ipv4.ip_local_port_range"] or "").split()
    if len(handed) != 2:
        return skip("the kernel does not tell")
    low, high = int(handed[0]), int(handed[1])
    reserved = _ranges(facts["sysctl"]["net.ipv4.ip_local_reserved_ports"])
    wanted = [use["port"] for use in plan["ports"]] + [port for span in _ranges(plan["ucx_ports"]) for port in span]
    exposed = [port for port in wanted if low <= port <= high and not any(port in span for span in reserved)]
    if not exposed:
        return ok(f"{low}-{high}")
    return bad(
        f"{exposed[0]}{f' and {len(exposed) - 1} more' if len(exposed) > 1 else ''} in {low}-{high}",
        "outside of it, or in net.ipv4.ip_local_reserved_ports",
        "reserve them: an outgoing connection may take one before the service starts",
        # The Ansible role is for GPU hosts.
        stage="" if plan["gpu_host"] else "bare",
    )


@check(43, "ptrace", "processes may read each other's memory", "warn", "bare", gpu_only=False)
def _ptrace(facts: Facts, plan: Plan) -> Outcome:
    """kernel.yama.ptrace_scope is at most 1."""
    transports = plan["fabric"]["transports"]
    if "cma" not in transports and not plan["gpu_host"]:
        return skip("nothing here reads another process's memory")
    scope = facts["sysctl"]["kernel.yama.ptrace_scope"]
    if scope is None or int(scope) <= 1:
        return ok(f"ptrace_scope {scope}" if scope is not None else "no Yama")
    return bad(
        f"kernel.yama.ptrace_scope {scope}",
        "0 or 1",
        "sysctl kernel.yama.ptrace_scope=1: UCX has no cma without it",
        verdict="fail" if "cma" in transports and "cuda_ipc" not in transports else "",
    )


@check(44, "sysctl", "kernel settings", "warn", "provisioned", mended_by="host_tuning")
def _sysctl(facts: Facts, _plan: Plan) -> Outcome:
    """kernel.numa_balancing is 0, vm.max_map_count at least 262144."""
    values = facts["sysctl"]
    balancing, maps = values["kernel.numa_balancing"], values["vm.max_map_count"]
    wrong = []
    if balancing not in (None, "0"):
        wrong.append(f"kernel.numa_balancing {balancing}")
    if maps is not None and int(maps) < 262144:
        wrong.append(f"vm.max_map_count {maps}")
    if not wrong:
        return ok("set")
    return bad(
        ", ".join(wrong), "kernel.numa_balancing 0, vm.max_map_count 262144 or more", "run the Ansible role host_tuning"
    )


@check(45, "time", "the clock is right", "warn", "bare", gpu_only=False)
def _time(facts: Facts, _plan: Plan) -> Outcome:
    """The clock follows a time server within 0.05 s."""
    clock = facts["time"]
    if clock["synchronized"] is None:
        return skip("neither chrony nor systemd tells")
    offset = clock["offset_s"]
    if clock["synchronized"] and (offset is None or offset < 0.05):
        return ok("synchronized" + (f", off by {offset * 1000:.2f} ms" if offset is not None else ""))
    found = f"off by {offset:.3f} s" if clock["synchronized"] else "not synchronized"
    return bad(found, "synchronized, within 0.05 s", "install chrony; certificates and etcd's leases go by the clock")


# --- 46 to 51: what serves ---------------------------------------------------------------------------------------


@check(46, "etcd", "etcd", "fail", "serving", gpu_only=False)
def _etcd(facts: Facts, plan: Plan) -> Outcome:
    """Each etcd member is healthy and lets the keys under v1/ be read; certificates are given as text."""
    paths = [name for name, value in plan["env"].items() if name.startswith("ETCD_AUTH_C") and "BEGIN" not in value]
    if paths:
        return bad(
            f"{listed(paths)} is a path",
            "the PEM text itself",
            "give the text: Dynamo 0.7 does not read the file",
            stage="bare",
        )
    said = facts["etcd"]
    if not said:
        return skip("not asked (--etcd)")
    if all("refused" in entry["error"] for entry in said.values()):
        return skip("etcd does not run yet")
    sick = [f"{url}: {entry['error'] or 'unhealthy'}" for url, entry in said.items() if not entry["healthy"]]
    if sick:
        return bad("; ".join(sick), "every member healthy", "etcdctl endpoint health --cluster; the member's log")
    denied = [f"{url}: {entry['read_error']}" for url, entry in said.items() if entry["readable"] is False]
    if denied:
        return bad("; ".join(denied), "the keys under v1/ may be read", "the role of the certificate's CN lacks v1/")
    return ok(f"{len(said)} healthy")


@check(47, "nats", "NATS", "fail", "serving", gpu_only=False)
def _nats(facts: Facts, plan: Plan) -> Outcome:
    """Each NATS server answers, has JetStream, and does not require TLS."""
    said = facts["nats"]
    if not said:
        return skip("not asked (--nats)")
    if all("refused" in entry["error"] for entry in said.values()):
        return skip("NATS does not run yet")
    silent = [f"{url}: {entry['error']}" for url, entry in said.items() if not entry["answers"]]
    if silent:
        return bad("; ".join(silent), "every server answers", "the server's log; curl 127.0.0.1:8222/healthz there")
    tls = [url for url, entry in said.items() if entry["tls_required"]]
    if tls:
        return bad(
            f"{listed(tls)} requires TLS",
            "TLS not required",
            "allow_non_tls: true; Dynamo 0.7 panics on required TLS (CryptoProvider)",
        )
    plain = [url for url, entry in said.items() if not entry["jetstream"]]
    if plain:
        return bad(
            f"{listed(plain)} has no JetStream", "JetStream on", "start it with -js, or mend the meta group's quorum"
        )
    open_ = [url for url, entry in said.items() if not entry["auth_required"]]
    if open_ and plan["nats_auth"]:
        return bad(f"{listed(open_)} lets anyone in", "a login required", "set accounts with users or nkeys")
    return ok(f"{len(said)} answer")


@check(48, "etcd_disk", "etcd's disk is quick", "warn", "serving", gpu_only=False)
def _etcd_disk(facts: Facts, plan: Plan) -> Outcome:
    """99 % of etcd's flushes take less than 10 ms, by its own histogram."""
    own = facts["etcd"].get(plan["etcd_member"])
    if not plan["etcd_member"]:
        return skip("no etcd member here")
    if not own or own["fsync_p99_s"] is None:
        return skip("its member tells no flush times")
    if own["fsync_p99_s"] <= 0.016:
        return ok(f"99 % of flushes below {own['fsync_p99_s'] * 1000:.0f} ms")
    return bad(
        f"99 % of flushes below {own['fsync_p99_s'] * 1000:.0f} ms",
        "10 ms (its buckets: below 16)",
        "put etcd's data on an SSD of its own, not on the GPU host's scratch disk",
    )


@check(49, "kernel_log", "no errors in the kernel's log", "warn", "bare")
def _kernel_log(facts: Facts, _plan: Plan) -> Outcome:
    """The kernel's log has no Xid and no error of driver or adapter since boot."""
    lines = facts["kernel_log"]
    if lines is None:
        return skip("this user may not read it")
    if not lines:
        return ok("none")
    codes = sorted({int(code) for line in lines for code in re.findall(r"Xid \(.*?\): (\d+)", line)})
    fix = f"look up Xid {listed(codes)} in NVIDIA's Xid table" if codes else "see dmesg"
    return bad(f"{len(lines)} lines, last: {lines[-1].strip()[-140:]}", "none since boot", fix)


@check(50, "model_readable", "the image's user may read the model", "fail", "image")
def _model_readable(facts: Facts, plan: Plan) -> Outcome:
    """The user of the image may read the model's directory and files."""
    about = facts["paths"].get(plan["model_dir"])
    if not about or not about["exists"]:
        return skip("the model is not there yet")
    user = {
        key: value for key, value in (facts.get("image") or {}).items() if key in ("uid", "gid") and value is not None
    }
    user = {**plan["image_user"], **user}
    uid, gid = user["uid"], user["gid"]
    closed = [] if _readable(about, uid, gid, 0o5) else [plan["model_dir"]]
    closed += [entry["name"] for entry in about["files"] if not _readable(entry, uid, gid, 0o4)]
    if not closed:
        return ok(f"uid {uid} gid {gid}")
    return bad(
        f"closed to uid {uid} gid {gid}: {listed(closed[:3])}",
        "readable",
        f"chgrp -R {gid} {plan['model_dir']} && chmod -R g+rX {plan['model_dir']}",
    )


def _readable(entry: Mapping[str, Any], uid: int, gid: int, wanted: int) -> bool:
    if uid == 0:
        return True
    shift = 6 if entry["uid"] == uid else 3 if entry["gid"] == gid else 0
    return bool((entry["mode"] >> shift) & wanted == wanted)


@check(51, "versions", "versions in the image", "warn", "image")
def _versions(facts: Facts, plan: Plan) -> Outcome:
    """ai-dynamo and tensorrt-llm in the image are of the versions file."""
    image = _image(facts)
    if isinstance(image, Outcome):
        return image
    have, wanted = image["versions"], plan["image_versions"]
    wrong = {name: have.get(name) for name, want in wanted.items() if have.get(name) != want}
    if not wrong:
        return ok(", ".join(f"{name} {have[name]}" for name in wanted))
    found = ", ".join(f"{name} {value or 'is not installed'}" for name, value in wrong.items())
    return bad(
        found,
        ", ".join(f"{name} {wanted[name]}" for name in wrong),
        "build the image again: the wheel's version was ignored; or correct versions.yml",
    )
