#!/usr/bin/python3
"""The programs that only a GPU host has, for a host that has none: they record their calls and act on a fake root.

One file under many names: the name it is called by says which program it is; `pdstack-fake run NAME ARGS` does the
same. Every call is a line of $PDSTACK_FAKE/argv.log: {"program": ..., "argv": [...]}. The state is what a real host
has, files of the fake root $PDSTACK_FAKE/root (sys/module/nvidia/version is what is loaded,
lib/modules/K/updates/dkms/nvidia.ko what is on disk, usr/lib/.../libnvidia-ml.so.V the library), and the rest, as
Secure Boot, in $PDSTACK_FAKE/state.json. README.md in the folder above lists all of it.
"""

import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid

BASE = os.environ.get("PDSTACK_FAKE", "/opt/pdstack-fake")
ROOT = os.path.join(BASE, "root")
STATE = os.path.join(BASE, "state.json")
LOG = os.path.join(BASE, "argv.log")
DEFAULTS = {
    "architecture": "x86_64", "dkms": {}, "driver_flavour": "open", "enrolled": [], "fabric": "Completed", "gpus": 2,
    "gpu_name": "NVIDIA H100 80GB HBM3", "initramfs_blacklist": False, "memory_mib": 81559, "mig": "Disabled",
    "nvswitches": 0, "ofed": "", "persistence": False, "reboots": 0, "secure_boot": False,
    "signer": "DKMS module signing key", "toolkit": "1.20.0", "compute_mode": "Default", "broken_modprobe": [],
    "containers": [], "stopped": [],
}  # fmt: skip
# What `install` puts in front of the real programs; the others come with packages, or by `pdstack-fake provide NAME`.
KERNEL_TOOLS = ("dkms", "dracut", "lsmod", "modinfo", "modprobe", "mokutil", "update-initramfs")
LINKED = (
    "etc/apt",
    "etc/docker",
    "etc/modprobe.d",
    "etc/os-release",
    "etc/systemd",
    "proc/sys/net",
    "proc/sys/vm",
    "run",
    "proc/sys/kernel/numa_balancing",
    "proc/sys/kernel/yama",
    "proc/meminfo",
    "var/lib/dpkg",
    "var/lib/docker",
)
OURS = re.compile(r"(nvidia|nouveau|gdrdrv|ib_|mlx|rdma|iw_)")
COMMUNICATE = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n"
)
NO_LIBRARY = (
    "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display Driver "
    "is properly installed and present in your system.\nPlease also try adding directory that contains "
    "libnvidia-ml.so to your system PATH.\n"
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: {}\n"


def kernel():
    text = read("proc/sys/kernel/osrelease")
    return text or platform.release()


def state():
    try:
        with open(STATE) as file:
            return dict(DEFAULTS, **json.load(file))
    except FileNotFoundError:
        return dict(DEFAULTS)


def save(new):
    os.makedirs(BASE, exist_ok=True)
    with open(STATE + ".new", "w") as file:
        json.dump(new, file, indent=2, sort_keys=True)
        file.write("\n")
    os.rename(STATE + ".new", STATE)


def change(**values):
    new = state()
    new.update(values)
    save(new)


def read(path):
    try:
        with open(os.path.join(ROOT, path)) as file:
            return file.read().strip()
    except OSError:
        return ""


def write(path, text):
    full = os.path.join(ROOT, path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "w") as file:
        file.write(text + "\n")


def drop(path):
    full = os.path.join(ROOT, path)
    if os.path.isdir(full):
        shutil.rmtree(full)
    elif os.path.lexists(full):
        os.remove(full)


def loaded():
    return read("sys/module/nvidia/version")


def module_path(name):
    return f"lib/modules/{kernel()}/updates/dkms/{name}.ko"


def module(name):
    """What modinfo would say of a module on disk, as a dict; empty when there is none."""
    return dict(line.split(": ", 1) for line in read(module_path(name)).splitlines() if ": " in line)


def version_key(text):
    return [int(part) for part in re.findall(r"\d+", text)]


def library():
    names = [os.path.basename(p) for p in glob.glob(ROOT + "/usr/lib/*-linux-gnu/libnvidia-ml.so.[0-9]*.*")]
    versions = [name.split(".so.", 1)[1] for name in names]
    return max(versions, key=version_key) if versions else ""


def load(name):
    """Load a module of the fake root; returns modprobe's message, empty when it worked."""
    if os.path.isdir(os.path.join(ROOT, "sys/module", name)):
        return ""
    now = state()
    if name in now["broken_modprobe"]:
        return f"modprobe: ERROR: could not insert '{name}': Invalid argument\n"
    if name == "nvidia":
        there = module("nvidia")
        if not there:
            return f"modprobe: FATAL: Module nvidia not found in directory /lib/modules/{kernel()}\n"
        if now["secure_boot"] and there.get("signer") not in now["enrolled"]:
            return "modprobe: ERROR: could not insert 'nvidia': Key was rejected by service\n"
        if os.path.isdir(os.path.join(ROOT, "sys/module/nouveau")) or not gpu_count():
            return "modprobe: ERROR: could not insert 'nvidia': No such device\n"
        write("sys/module/nvidia/version", there["version"])
        kind = "Open Kernel Module for x86_64" if there.get("flavour") == "open" else "x86_64 Kernel Module"
        write(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX {}  {}  Release Build  (stand-in)".format(kind, there["version"]),
        )
        for number in range(gpu_count()):
            write(f"dev/nvidia{number}", "")
        write("dev/nvidiactl", "")
        return ""
    if name.startswith("nvidia") and not loaded():
        failed = load("nvidia")
        if failed:
            return failed.replace("'nvidia'", f"'{name}'").replace("Module nvidia", "Module " + name)
    if name == "nvidia_peermem" and not now["ofed"]:
        return "modprobe: ERROR: could not insert 'nvidia_peermem': Invalid argument\n"
    if name == "nvidia_peermem":
        write("sys/kernel/mm/memory_peers/nv_mem/version", loaded())
    if name == "gdrdrv":
        if not module("gdrdrv"):
            return f"modprobe: FATAL: Module gdrdrv not found in directory /lib/modules/{kernel()}\n"
        write("dev/gdrdrv", "")
    write(f"sys/module/{name}/initstate", "live")
    write(f"sys/module/{name}/version", module(name).get("version") or loaded() or "1.0")
    return ""


def unload(name):
    drop("sys/module/" + name)
    if name == "nvidia":
        drop("proc/driver/nvidia/version")
        for path in glob.glob(ROOT + "/dev/nvidia*"):
            os.remove(path)
    if name == "nvidia_peermem":
        drop("sys/kernel/mm/memory_peers/nv_mem")
    if name == "gdrdrv":
        drop("dev/gdrdrv")


def gpu_count():
    """GPUs on the fake root's PCI bus; the state's number where there is no bus."""
    bus = glob.glob(ROOT + "/sys/bus/pci/devices/*/vendor")
    if not bus:
        return state()["gpus"]
    found = 0
    for path in bus:
        with open(path) as file:
            vendor = file.read().strip()
        with open(os.path.join(os.path.dirname(path), "class")) as file:
            found += vendor == "0x10de" and file.read().startswith(("0x0300", "0x0302"))
    return found


# --- programs -----------------------------------------------------------------------------------------------------


def run_modprobe(argv):
    names = [word.replace("-", "_") for word in argv if not word.startswith("-")]
    if not any(OURS.match(name) for name in names):
        for real in ("/sbin/modprobe", "/usr/sbin/modprobe"):
            if os.path.exists(real):
                os.execv(real, [real, *argv])
    flags = "".join(word for word in argv if word.startswith("-"))
    for name in names:
        if "r" in flags:
            unload(name)
            continue
        failed = load(name)
        if failed:
            sys.stderr.write(failed)
            return 1
    return 0


def run_modinfo(argv):
    names, wanted, rest = [], "", list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-F", "--field"):
            wanted = rest.pop(0)
        elif word in ("-k", "--set-version"):
            rest.pop(0)
        elif not word.startswith("-"):
            names.append(word)
    for name in names:
        there = module(name.replace("-", "_"))
        if not there:
            sys.stderr.write(f"modinfo: ERROR: Module {name} not found.\n")
            return 1
        values = {"filename": "/" + module_path(name)}
        values.update(there)
        if wanted:
            if values.get(wanted):
                print(values[wanted])
        else:
            print("\n".join("{}:{}{}".format(key, " " * max(1, 15 - len(key)), value) for key, value in values.items()))
    return 0


def build(name, version, for_kernel):
    if not os.path.exists(os.path.join(ROOT, "lib/modules", for_kernel, "build/Makefile")):
        sys.stderr.write(
            f"Error! Your kernel headers for kernel {for_kernel} cannot be found at "
            f"/lib/modules/{for_kernel}/build or /lib/modules/{for_kernel}/source.\n"
        )
        return 21
    now = state()
    now["dkms"][f"{name}/{version}"] = "installed"
    save(now)
    flavour = "proprietary"
    conf = f"/usr/src/{name}-{version}/dkms.conf"
    if os.path.exists(conf):
        with open(conf) as file:
            flavour = "open" if "# open" in file.read() else "proprietary"
    licence = "Dual MIT/GPL" if flavour == "open" else "NVIDIA"
    text = "version: {}\nlicense: {}\nsigner: {}\nflavour: {}".format(version, licence, now["signer"], flavour)
    write(f"lib/modules/{for_kernel}/updates/dkms/{name}.ko", text)
    return 0


def run_dkms(argv):
    verb = argv[0] if argv else "status"
    which = next((word for word in argv[1:] if "/" in word), "")
    name, _, version = which.partition("/")
    for_kernel = argv[argv.index("-k") + 1] if "-k" in argv else kernel()
    now = state()
    if verb == "status":
        for entry, how in sorted(now["dkms"].items()):
            print(
                f"{entry}: added"
                if how == "added"
                else "{}, {}, {}: {}".format(entry, for_kernel, now["architecture"], how)
            )
        return 0
    if verb == "add":
        now["dkms"].setdefault(which, "added")
        save(now)
        return 0
    if verb in ("install", "build"):
        return build(name, version, for_kernel)
    if verb == "autoinstall":
        return max([0] + [build(entry.split("/")[0], entry.split("/")[1], for_kernel) for entry in sorted(now["dkms"])])
    if verb == "remove":
        now["dkms"].pop(which, None)
        save(now)
        if module(name).get("version") == version:
            drop(module_path(name))
        return 0
    return 0


def run_mokutil(argv):
    if "--sb-state" in argv:
        print("SecureBoot enabled" if state()["secure_boot"] else "SecureBoot disabled")
        return 0
    if "--test-key" in argv:
        known = state()["signer"] in state()["enrolled"]
        print("{} is {}".format(argv[argv.index("--test-key") + 1], "already enrolled" if known else "not enrolled"))
        return 0
    if "--list-enrolled" in argv:
        for number, signer in enumerate(state()["enrolled"], 1):
            print(f"[key {number}]\n        Subject: CN={signer}")
    return 0


def run_initramfs(argv):
    """The image takes in what modprobe.d says now."""
    text = ""
    for path in glob.glob("/etc/modprobe.d/*.conf") + glob.glob(ROOT + "/etc/modprobe.d/*.conf"):
        with open(path) as file:
            text += file.read() + "\n"
    change(initramfs_blacklist=bool(re.search(r"^blacklist nouveau$", text, re.MULTILINE)))
    return 0


def run_lsmod(argv):
    print("Module                  Size  Used by")
    for path in sorted(glob.glob(ROOT + "/sys/module/*/")):
        print("{:<24}16384  0".format(path.rstrip("/").rsplit("/", 1)[1]))
    return 0


def uuid_of(number):
    return f"GPU-{number:08d}-0000-4000-8000-{number:012d}"


def run_smi(argv):
    if not library():
        sys.stdout.write(NO_LIBRARY)
        return 12
    if not loaded():
        sys.stdout.write(COMMUNICATE)
        return 9
    if loaded() != library():
        sys.stdout.write(MISMATCH.format(".".join(library().split(".")[:2])))
        return 18
    now = state()
    gpus = range(gpu_count())
    if argv[:1] == ["-L"] or argv[:1] == ["--list-gpus"]:
        for number in gpus:
            print("GPU {}: {} (UUID: {})".format(number, now["gpu_name"], uuid_of(number)))
        return 0
    query = next((word.split("=", 1)[1] for word in argv if word.startswith("--query-gpu=")), "")
    if query:
        form = next((word for word in argv if word.startswith("--format=")), "")
        fields = [word.strip() for word in query.split(",")]
        if "noheader" not in form:
            print(", ".join(fields))
        for number in gpus:
            memory = str(now["memory_mib"]) + ("" if "nounits" in form else " MiB")
            values = {
                "index": str(number), "uuid": uuid_of(number), "name": now["gpu_name"], "memory.total": memory,
                "persistence_mode": "Enabled" if now["persistence"] else "Disabled", "driver_version": loaded(),
                "ecc.errors.uncorrected.volatile.total": "0", "compute_mode": now["compute_mode"],
                "mig.mode.current": now["mig"], "pci.bus_id": f"00000000:{number + 1:02X}:00.0",
                "ecc.mode.current": "Enabled", "fabric.state": now["fabric"] if now["nvswitches"] else "[N/A]",
                "fabric.status": "Success" if now["nvswitches"] else "[N/A]",
            }  # fmt: skip
            print(", ".join(values.get(key, "[N/A]") for key in fields))
        return 0
    if "-q" in argv:
        fabric = now["fabric"] if now["nvswitches"] else "N/A"
        for number in gpus:
            print(f"GPU 00000000:{number + 1:02X}:00.0")
            print("    MIG Mode\n        Current                           : {}".format(now["mig"]))
            print(f"    Fabric\n        State                             : {fabric}")
            print("        Status                            : {}".format("Success" if now["nvswitches"] else "N/A"))
        return 0
    if argv[:2] == ["topo", "-p2p"]:
        print("\t" + "\t".join(f"GPU{number}" for number in gpus))
        for number in gpus:
            print(f"GPU{number}\t" + "\t".join("X" if number == other else "OK" for other in gpus))
        return 0
    if argv[:2] == ["topo", "-m"]:
        print("\t" + "\t".join(f"GPU{number}" for number in gpus))
        for number in gpus:
            print(f"GPU{number}\t" + "\t".join("X" if number == other else "NV18" for other in gpus))
        return 0
    print("| NVIDIA-SMI {0}    Driver Version: {0}    CUDA Version: 13.0 |".format(loaded()))
    return 0


def run_ctk(argv):
    """nvidia-ctk as it is: rewrites the file always, exits 0 always, and drops other features with --cdi.enabled."""
    now = state()
    if "--version" in argv or argv[:1] == ["-v"]:
        print("NVIDIA Container Toolkit CLI version {}\ncommit: stand-in".format(now["toolkit"]))
        return 0

    def value(name, default):
        for position, word in enumerate(argv):
            if word.startswith(name + "="):
                return word.split("=", 1)[1]
            if word == name and position + 1 < len(argv):
                return argv[position + 1]
        return default

    if argv[:2] == ["runtime", "configure"]:
        path = value("--config", "/etc/docker/daemon.json")
        document = {}
        if os.path.exists(path):
            with open(path) as file:
                document = json.load(file)
        document.setdefault("runtimes", {})["nvidia"] = {"args": [], "path": "nvidia-container-runtime"}
        if "--set-as-default" in argv or "--nvidia-set-as-default" in argv:
            document["default-runtime"] = "nvidia"
        if "--cdi.enabled" in argv:
            document["features"] = {"cdi": True}
        text = json.dumps(document, indent=4, sort_keys=True)
        if "--dry-run" in argv:
            print(text)
        else:
            with open(path, "w") as file:
                file.write(text)
        return 0
    devices = [f"nvidia.com/gpu={number}" for number in range(gpu_count())] + ["nvidia.com/gpu=all"]
    if argv[:2] == ["cdi", "list"]:
        found = devices if os.path.exists("/var/run/cdi/nvidia.yaml") or os.path.exists("/etc/cdi/nvidia.yaml") else []
        sys.stderr.write(f'level=info msg="Found {len(found)} CDI devices"\n')
        print("\n".join(found))
        return 0
    if argv[:2] == ["cdi", "generate"]:
        if not loaded():
            sys.stderr.write(
                'level=error msg="failed to generate CDI spec: failed to initialize NVML: ERROR_LIBRARY_NOT_FOUND"\n'
            )
            return 1
        text = json.dumps(
            {
                "cdiVersion": "0.5.0",
                "kind": "nvidia.com/gpu",
                # What an engine does with a device can be seen in the container.
                "devices": [
                    {"name": name, "containerEdits": {"env": ["PDSTACK_CDI=" + name]}}
                    for name in (device.split("=")[1] for device in devices)
                ],
            }
        )
        target = value("--output", "")
        if target:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "w") as file:
                file.write(text + "\n")
        else:
            print(text)
    return 0


def run_container_cli(argv):
    if not loaded():
        sys.stderr.write("nvidia-container-cli: initialization error: nvml error: driver not loaded\n")
        return 1
    print(f"NVRM version:   {loaded()}\nCUDA version:   13.0")
    return 0


def run_container_runtime(argv):
    os.execvp("runc", ["runc", *argv])


def run_ofed_info(argv):
    version = state()["ofed"]
    if not version:
        sys.stderr.write("ofed_info: command not found\n")
        return 127
    print(f"OFED-internal-{version}:")
    return 0


def run_docker(argv):
    """Enough of docker for a host that is drained: the names in the state's `containers` run until they are stopped."""
    now = state()
    if argv[:1] == ["info"]:
        print(
            json.dumps({"ServerVersion": "27.5.1", "Runtimes": {"nvidia": {}, "runc": {}}, "CgroupDriver": "systemd"})
        )
    if argv[:1] == ["ps"]:
        print("\n".join(now["containers"]))
    if argv[:1] == ["inspect"]:
        for number, name in enumerate(argv[argv.index("--format") + 2 :], 4000):
            print(f"{number}|/{name}|test|private|private|nvidia|null")
    if argv[:1] == ["stop"]:
        left = [name for name in now["containers"] if name not in argv]
        change(containers=left, stopped=argv[1:])
    return 0


def run_gdrcopy_sanity(argv):
    good = os.path.exists(os.path.join(ROOT, "dev/gdrdrv"))
    print(f"Total: 28, Passed: {28 if good else 0}, Failed: {0 if good else 28}, Waived: 0")
    return 0 if good else 1


def run_ibv_devinfo(argv):
    names = sorted(os.path.basename(path) for path in glob.glob(ROOT + "/sys/class/infiniband/*"))
    if not names:
        sys.stderr.write("Failed to get IB devices list: Function not implemented\n")
        return 255
    for name in names:
        print(f"hca_id:\t{name}\n\t\tport:\t1\n\t\t\tstate:\t\t\tPORT_ACTIVE (4)")
    return 0


PROGRAMS = {
    "dkms": run_dkms, "docker": run_docker, "dracut": run_initramfs, "gdrcopy_sanity": run_gdrcopy_sanity,
    "ibv_devinfo": run_ibv_devinfo,
    "lsmod": run_lsmod, "modinfo": run_modinfo, "modprobe": run_modprobe, "mokutil": run_mokutil,
    "nvidia-container-cli": run_container_cli, "nvidia-container-runtime": run_container_runtime,
    "nvidia-ctk": run_ctk, "nvidia-smi": run_smi, "ofed_info": run_ofed_info, "update-initramfs": run_initramfs,
}  # fmt: skip


# --- the program `pdstack-fake` -----------------------------------------------------------------------------------


def fork_and_sleep(name, argv):
    """What the units start: a daemon with the argv it was given."""
    if os.fork() == 0:
        os.setsid()
        sys.stdin.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.execvp("sleep", [name + " " + " ".join(argv), "infinity"])
    return 0


def do_fabricmanager(argv):
    version, rest = argv[0], argv[1:]
    if not loaded():
        sys.stderr.write("failed to initialize NVML: driver not loaded\n")
        return 1
    if version != loaded():
        sys.stderr.write(
            f"fabric manager NVIDIA GPU driver interface version {version} don't match with driver version {loaded()}. "
            "Please update with matching NVIDIA driver package.\n"
        )
        return 1
    return fork_and_sleep("nv-fabricmanager", rest)


def do_persistenced(argv):
    if not loaded():
        sys.stderr.write("nvidia-persistenced failed to initialize. Check syslog for more details.\n")
        return 1
    user = argv[argv.index("--user") + 1] if "--user" in argv else "root"
    if subprocess.call(["getent", "passwd", user], stdout=subprocess.DEVNULL) != 0:
        sys.stderr.write(f"nvidia-persistenced: unknown user {user}\n")
        return 1
    change(persistence="--no-persistence-mode" not in argv)
    return fork_and_sleep("nvidia-persistenced", argv)


def do_reboot(argv):
    """What a boot does: nothing of the old kernel's state stays; modules come from the disk."""
    now = state()
    nouveau = os.path.isdir(os.path.join(ROOT, "sys/module/nouveau")) and not now["initramfs_blacklist"]
    for path in glob.glob(ROOT + "/sys/module/nvidia*") + glob.glob(ROOT + "/sys/module/gdrdrv"):
        unload(os.path.basename(path))
    if not nouveau:
        drop("sys/module/nouveau")
    drop("var/run/reboot-required")
    write("proc/sys/kernel/random/boot_id", str(uuid.uuid4()))
    # A container that restarts always comes back with the engine, also when it was stopped by hand.
    containers = now["containers"] + now["stopped"]
    change(reboots=now["reboots"] + 1, persistence=False, containers=containers, stopped=[])
    failed = load("nvidia") if module("nvidia") else ""
    wanted = ""
    for path in glob.glob("/etc/modules-load.d/*.conf"):
        with open(path) as file:
            wanted += file.read() + "\n"
    for line in wanted.splitlines():
        name = line.strip().replace("-", "_")
        if OURS.match(name):
            failed += load(name)
    for unit in ("nvidia-persistenced", "nvidia-fabricmanager"):
        if subprocess.call(["systemctl", "is-enabled", "--quiet", unit], stderr=subprocess.DEVNULL) == 0:
            subprocess.call(["systemctl", "restart", unit])
    sys.stderr.write(failed)
    return 0


def do_install(argv):
    """Put the stand-ins in front of the real programs, and into the fake root, where the probe looks first."""
    target = argv[0] if argv else "/usr/local/sbin"
    here = os.path.realpath(__file__)
    os.makedirs(os.path.join(ROOT, "usr/bin"), exist_ok=True)
    write("proc/sys/kernel/osrelease", kernel())
    # What is of the test host and no stand-in.
    for path in LINKED:
        place = os.path.join(ROOT, path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if not os.path.lexists(place):
            os.symlink("/" + path, place)
    write("var/lib/dkms/mok.pub", "stand-in")
    write("proc/sys/kernel/random/boot_id", str(uuid.uuid4()))
    for name in ("pdstack-fake", *KERNEL_TOOLS):
        for folder in (target, os.path.join(ROOT, "usr/bin")):
            path = os.path.join(folder, name)
            if os.path.lexists(path):
                os.remove(path)
            os.symlink(here, path)
    save(state())
    return 0


def do_provide(argv):
    """Put further programs there, as their packages would: pdstack-fake provide nvidia-smi nvidia-ctk."""
    for name in argv:
        if name not in PROGRAMS:
            sys.exit("pdstack-fake: no stand-in {}; there are {}".format(name, ", ".join(sorted(PROGRAMS))))
        for folder in ("/usr/local/sbin", os.path.join(ROOT, "usr/bin")):
            path = os.path.join(folder, name)
            if not os.path.lexists(path):
                os.symlink(os.path.realpath(__file__), path)
    return 0


def do_withdraw(argv):
    """Take programs away again that `provide` put there."""
    for name in argv:
        for folder in ("/usr/local/sbin", os.path.join(ROOT, "usr/bin")):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                os.remove(path)
    return 0


def do_driver(argv):
    """Make the host one with a driver, without packages: pdstack-fake driver 580.105.08 [LOADED [LIBRARY]]."""
    disk = argv[0]
    write(f"lib/modules/{kernel()}/build/Makefile", "# stand-in")
    run_dkms(["install", "nvidia/" + disk])
    text = read(module_path("nvidia")).replace("flavour: proprietary", "flavour: " + state()["driver_flavour"])
    write(module_path("nvidia"), text)
    for path in glob.glob(ROOT + "/usr/lib/*-linux-gnu/libnvidia-ml.so.*"):
        os.remove(path)
    write("usr/lib/x86_64-linux-gnu/libnvidia-ml.so." + (argv[2] if len(argv) > 2 else disk), "stand-in")
    unload("nvidia")
    failed = load("nvidia")
    if len(argv) > 1:
        write("sys/module/nvidia/version", argv[1])
    sys.stderr.write(failed)
    return 1 if failed else 0


def do_plug(argv):
    """Put GPUs and NVSwitches on the PCI bus: pdstack-fake plug 2 [1]."""
    for path in glob.glob(ROOT + "/sys/bus/pci/devices/0000:*"):
        shutil.rmtree(path)
    counts = [int(word) for word in argv] + [0]
    kinds = [("0x030200", "0x2330", number + 1) for number in range(counts[0])]
    kinds += [("0x068000", "0x22a3", number + 0x81) for number in range(counts[1])]
    for kind, device, bus in kinds:
        base = f"sys/bus/pci/devices/0000:{bus:02x}:00.0/"
        for name, text in (("vendor", "0x10de"), ("device", device), ("class", kind), ("numa_node", "0")):
            write(base + name, text)
    change(gpus=counts[0], nvswitches=counts[1])
    return 0


def do_nouveau(argv):
    """Load nouveau, as the kernel does on a host without blacklist."""
    write("sys/module/nouveau/initstate", "live")
    return 0


def do_set(argv):
    name, text = argv
    if name not in DEFAULTS:
        sys.exit("pdstack-fake: no setting {}; there are {}".format(name, ", ".join(sorted(DEFAULTS))))
    try:
        change(**{name: json.loads(text)})
    except ValueError:
        change(**{name: text})
    return 0


def do_show(argv):
    seen = {"loaded": loaded(), "on_disk": module("nvidia").get("version", ""), "library": library()}
    print(json.dumps(dict(state(), **seen), indent=2, sort_keys=True))
    return 0


COMMANDS = {
    "driver": do_driver, "fabricmanager": do_fabricmanager, "install": do_install, "nouveau": do_nouveau,
    "persistenced": do_persistenced, "plug": do_plug, "provide": do_provide, "reboot": do_reboot,
    "set": do_set, "show": do_show, "withdraw": do_withdraw,
}  # fmt: skip
# Not worth a line of the log.
QUIET = ("install", "provide", "set", "show", "driver", "plug", "nouveau", "withdraw")


def record(program, argv):
    line = json.dumps({"program": program, "argv": argv}) + "\n"
    try:
        with open(LOG, "a") as file:
            file.write(line)
    except OSError:
        # A probe that runs without root cannot write here, and must work all the same.
        return


def main():
    name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
    if name in ("pdstack-fake", "standin.py"):
        if argv[:1] == ["run"]:
            name, argv = argv[1], argv[2:]
        elif argv and argv[0] in COMMANDS:
            if argv[0] not in QUIET:
                record(argv[0], argv[1:])
            return COMMANDS[argv[0]](argv[1:])
        else:
            sys.exit("usage: pdstack-fake run PROGRAM ARGS | {}".format(" | ".join(sorted(COMMANDS))))
    record(name, argv)
    return PROGRAMS[name](argv)


if __name__ == "__main__":
    sys.exit(main())
