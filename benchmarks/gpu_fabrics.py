"""The environment of every fabric profile that one GPU can carry, with two processes and GPU memory.

For each profile of inventories/common (engine trtllm) that needs no RDMA device, a process exports 256 MiB of GPU
memory and another reads it with NIXL (backend nixl): as one region, and in 32 KiB blocks. Both have exactly the
environment that `fabrics.environment` gives. Then the same over `ucx_perftest` (backend ucx: tagged messages of GPU
memory, as TensorRT-LLM sends them), if `--ucx` names the unpacked libucx wheel. Printed: the transport that UCX took,
read from its own log, GB/s, and in the same run a device-to-device copy of the same bytes: the limit. The bytes that
arrived are compared.

Needs torch with CUDA, PyYAML and a NIXL wheel (nixl-cu13; 0.7.1 is the runtime image's, 1.5.1 works as well):

    python3 -m pip download -q --no-deps -d .whl --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 nixl-cu13==0.7.1 libucx-cu13==1.19.0
    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site:src:. python3 -m benchmarks.gpu_fabrics --ucx /tmp/site/libucx --json gpu_fabrics.json

`--memory host` moves host memory instead: the same paths of the program, for a machine without a GPU.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pdstack.deploy import fabrics, ucx_log

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "inventories/common/group_vars/all/fabrics.yml"
REGION = 256 << 20
BLOCK = 32 << 10
ROUNDS = 5
# A transfer that crawls over the host is measured with fewer bytes, not waited for.
PATIENCE_S = 60.0
PERFTEST_PORT = 14173
SEED = 20251124

Record = dict[str, Any]


def clean(extra: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what speaks to UCX, NIXL or TensorRT-LLM, and with `extra`."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("UCX_", "NIXL_", "TRTLLM_"))}
    return {**plain, "PYTHONUNBUFFERED": "1", **extra}


def nixl_environment() -> dict[str, str]:
    """Where a NIXL wheel keeps its plugins and UCX's modules: not every release finds them by itself."""
    for name in ("nixl_cu13", "nixl_cu12"):
        found = importlib.util.find_spec(name)
        if found and found.submodule_search_locations:
            site = Path(next(iter(found.submodule_search_locations))).parent
            for folder in (site / f"{name}.libs/nixl", site / f".{name}.mesonpy.libs/plugins"):
                if folder.is_dir():
                    return {"NIXL_PLUGIN_DIR": str(folder), "UCX_MODULE_DIR": str(site / f"{name}.libs/ucx")}
    return {}


# --- a process of the pair: commands as JSON lines on `--in`, answers on `--out`; stdout is UCX's log


class Memory:
    """A region in GPU or host memory, by its address."""

    def __init__(self, kind: str, nbytes: int) -> None:
        self.kind = kind
        self.name = "VRAM" if kind == "gpu" else "DRAM"
        self.nbytes = nbytes
        if kind == "gpu":
            torch: Any = importlib.import_module("torch")
            self._torch: Any = torch
            self.data: Any = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            self.address = int(self.data.data_ptr())
        else:
            import numpy

            self._numpy: Any = numpy
            self.data = numpy.zeros(nbytes, dtype=numpy.uint8)
            self.address = int(self.data.ctypes.data)

    def fill(self, seed: int) -> None:
        """Write a pattern that is another one for another seed and place."""
        if self.kind == "gpu":
            t = self._torch
            generator = t.Generator(device="cuda").manual_seed(seed)
            self.data.copy_(t.randint(0, 256, (self.nbytes,), dtype=t.uint8, device="cuda", generator=generator))
            t.cuda.synchronize()
        else:
            self.data[:] = self._numpy.random.default_rng(seed).integers(0, 256, self.nbytes, dtype=self._numpy.uint8)

    def digest(self) -> str:
        """Return a checksum of all bytes."""
        import hashlib

        data = self.data.cpu().numpy() if self.kind == "gpu" else self.data
        return hashlib.sha256(data).hexdigest()

    def copy_gbs(self) -> float:
        """Return GB/s of a copy of the region within its memory, the best of some rounds."""
        best = 0.0
        other = self.data.clone() if self.kind == "gpu" else self.data.copy()
        for _ in range(ROUNDS + 2):
            began = time.perf_counter()
            if self.kind == "gpu":
                other.copy_(self.data)
                self._torch.cuda.synchronize()
            else:
                other[:] = self.data
            best = max(best, self.nbytes / (time.perf_counter() - began) / 1e9)
        return best


def api() -> Any:
    """Import NIXL's Python API from whichever wheel there is."""
    for name in ("nixl_cu13._api", "nixl_cu12._api", "nixl._api"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            last = error
    raise SystemExit(f"no NIXL wheel can be imported: {last}")


class Side:
    """One process of a pair."""

    def __init__(self, role: str, kind: str) -> None:
        nixl = api()
        self.memory = Memory(kind, REGION)
        self.agent = nixl.nixl_agent(f"{role}-{os.getpid()}", nixl.nixl_agent_config(backends=[]))
        self.agent.create_backend("UCX", {})
        self.registered = self.agent.register_memory([(self.memory.address, REGION, 0, role)], self.memory.name)
        self.peer = ""
        self.remote = 0

    def describe(self) -> Record:
        """Fill the memory and return what the other side needs."""
        self.memory.fill(SEED)
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": self.memory.address, "digest": self.memory.digest()}

    def connect(self, metadata: str, address: int) -> Record:
        """Take in the other side."""
        name = self.agent.add_remote_agent(base64.b64decode(metadata))
        self.peer = name.decode() if isinstance(name, bytes) else str(name)
        self.remote = address
        return {}

    def read(self, block: int) -> Record:
        """Read the whole region in blocks of `block` bytes, again and again; return the best GB/s and the checksum."""
        best, rounds, total = 0.0, 0, 0.0
        offsets = range(0, REGION, block)
        local = self.agent.get_xfer_descs([(self.memory.address + at, block, 0) for at in offsets], self.memory.name)
        there = self.agent.get_xfer_descs([(self.remote + at, block, 0) for at in offsets], self.memory.name)
        while rounds < ROUNDS and total < PATIENCE_S:
            handle = self.agent.initialize_xfer("READ", local, there, self.peer)
            began = time.perf_counter()
            state = self.agent.transfer(handle)
            while state == "PROC":
                state = self.agent.check_xfer_state(handle)
            took = time.perf_counter() - began
            self.agent.release_xfer_handle(handle)
            if state != "DONE":
                return {"error": f"NIXL's transfer ended in the state {state}"}
            best, rounds, total = max(best, REGION / took / 1e9), rounds + 1, total + took
        return {"gbs": best, "rounds": rounds, "digest": self.memory.digest()}

    def spoil(self) -> Record:
        """Write other bytes over the memory, so that the next read has to bring the right ones."""
        self.memory.fill(SEED + 1)
        return {}

    def copy(self) -> Record:
        """Measure the limit."""
        return {"gbs": self.memory.copy_gbs()}


def child(role: str, kind: str, incoming: int, outgoing: int) -> None:
    """Answer commands until they end."""
    side = Side(role, kind)
    with os.fdopen(incoming) as commands, os.fdopen(outgoing, "w") as answers:
        for line in commands:
            command = json.loads(line)
            try:
                answer = getattr(side, command.pop("do"))(**command)
            except Exception as error:  # whatever NIXL raises is the answer
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


# --- the program that starts pairs


class Process:
    """A child with a log file and a pipe each way."""

    def __init__(self, role: str, kind: str, environment: Mapping[str, str], folder: Path) -> None:
        there, self._to = os.pipe()
        self._from, back = os.pipe()
        self.log = folder / f"{role}.log"
        words = ["--child", role, "--memory", kind, "--in", str(there), "--out", str(back)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_fabrics", *words],
                env=dict(environment), cwd=ROOT, pass_fds=(there, back), stdout=log, stderr=log,
            )  # fmt: skip
        os.close(there)
        os.close(back)
        self._answers = os.fdopen(self._from)

    def ask(self, **command: Any) -> Record:
        """Send a command and return its answer; a dead or silent process is an error in the answer."""
        try:
            os.write(self._to, (json.dumps(command) + "\n").encode())
        except BrokenPipeError:
            return {"error": f"the process ended: {self.tail()}"}
        ready, _, _ = select.select([self._answers], [], [], 2 * PATIENCE_S + 60)
        line = self._answers.readline() if ready else ""
        return json.loads(line) if line else {"error": f"no answer: {self.tail()}"}

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(errors="replace")[-400:].strip()

    def end(self) -> str:
        """Stop the process and return its log."""
        os.close(self._to)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()
        return self.log.read_text(errors="replace")


def measure_nixl(kind: str, environment: Mapping[str, str]) -> Record:
    """Read between two processes with NIXL; return GB/s of each block size, the limit, and what UCX says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = clean({**nixl_environment(), **environment})
        prefill, decode = (Process(role, kind, given, folder) for role in ("prefill", "decode"))
        record: Record = {}
        try:
            there = prefill.ask(do="describe")
            limit = decode.ask(do="copy")
            record["copy_gbs"] = round(limit.get("gbs", 0.0), 1)
            failed: str | None = there.get("error") or limit.get("error")
            if not failed:
                failed = decode.ask(do="connect", metadata=there["metadata"], address=there["address"]).get("error")
            for label, block in (("whole_gbs", REGION), ("blocks_32k_gbs", BLOCK)):
                answer: Record = {"error": failed} if failed else decode.ask(do="read", block=block)
                failed = answer.get("error")
                if not failed and answer["digest"] != there["digest"]:
                    failed = f"{label}: the bytes that arrived are not those that were there"
                if not failed:
                    record[label] = round(answer["gbs"], 2)
            if failed:
                record["error"] = failed
        finally:
            logs = [prefill.end(), decode.end()]
        return record | told(logs, logs[1])


def told(logs: list[str], reader: str) -> Record:
    """Return what UCX logged: the transports of KV, the row that says it, the complaints of both sides."""
    chosen = ucx_log.kv_choices(ucx_log.choices(reader))
    rows = [f"{choice.operation}: {choice.how} [{'+'.join(choice.transports)}]" for choice in chosen]
    return {
        "transports": list(ucx_log.kv_transports(reader)),
        "rows": list(dict.fromkeys(rows)),
        "complaints": list(dict.fromkeys(text for log in logs for text in ucx_log.complaints(log))),
        "log": "".join(line for line in reader.splitlines(keepends=True) if "|" in line)[-6000:],
    }


def measure_ucx(kind: str, environment: Mapping[str, str], ucx: Path) -> Record:
    """Send tagged messages of the region's size between two `ucx_perftest`; return GB/s and what UCX says."""
    where = {"LD_LIBRARY_PATH": f"{ucx / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    given = clean({**where, **environment})
    program = [str(ucx / "bin/ucx_perftest"), "-p", str(PERFTEST_PORT), "-m", "cuda" if kind == "gpu" else "host"]
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "server.log"
        with log.open("wb") as sink:
            server = subprocess.Popen(program, env=given, stdout=sink, stderr=sink)
        try:
            time.sleep(3.0)
            words = ["-t", "tag_bw", "-s", str(REGION), "-n", "20", "-w", "2", "-O", "1", "-f", "127.0.0.1"]
            client = subprocess.run(
                [*program, *words], env=given, capture_output=True, text=True, timeout=PATIENCE_S * 2, check=False
            )
            text = client.stdout + client.stderr
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode(errors="replace")
        finally:
            server.kill()
            server.wait()
        logs = [log.read_text(errors="replace"), text]
    record = told(logs, "".join(logs))
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 7 and (words[0] == "Final:" or words[0].isdigit()):
            record["message_gbs"] = round(float(words[-3]) * (1 << 20) / 1e9, 2)
    if "message_gbs" not in record:
        record["error"] = f"ucx_perftest: {text[-400:].strip()}"
    return record


def carried(name: str, profile: Mapping[str, Any]) -> str:
    """Return why one GPU cannot carry a profile, nothing if it can."""
    if fabrics.TRTLLM not in profile.get("engines", (fabrics.TRTLLM,)):
        return "not for engine trtllm"
    if fabrics.effective(profile, fabrics.TRTLLM).get("net_devices") == "rdma":
        return f"{name} needs RDMA devices" if not list(Path("/sys/class").glob("infiniband/*")) else ""
    return ""


def main() -> None:
    """Measure every profile that can be, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", choices=("gpu", "host"), default="gpu")
    parser.add_argument("--ucx", type=Path, help="the unpacked libucx wheel (the folder that holds bin and lib)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profiles", nargs="*", help="only these")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--in", type=int, dest="incoming", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=int, dest="outgoing", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.memory, given.incoming, given.outgoing)
        return
    known: dict[str, Any] = yaml.safe_load(PROFILES.read_text())["kv_fabrics"]
    results: Record = {}
    for name, profile in known.items():
        if given.profiles and name not in given.profiles:
            continue
        if reason := carried(name, profile):
            print(f"{name:15} -       {reason}")
            results[name] = {"skipped": reason}
            continue
        promised = fabrics.promised(profile, same_host=True)
        results[name] = {"promised": list(promised), "environment": {}}
        for backend in fabrics.BACKENDS:
            if backend == "ucx" and given.ucx is None:
                continue
            variables = {"kv_interface": "lo"} if profile.get("net_devices") == "interface" else {}
            environment = fabrics.environment(profile, variables, engine=fabrics.TRTLLM, backend=backend)
            results[name]["environment"][backend] = environment
            found = (
                measure_nixl(given.memory, environment)
                if backend == "nixl"
                else measure_ucx(given.memory, environment, given.ucx)
            )
            found["kept"] = bool(found["transports"]) and set(found["transports"]) <= set(promised)
            results[name][backend] = found
            figures = " ".join(f"{key}={found[key]}" for key in found if key.endswith("_gbs"))
            word = "as promised" if found["kept"] else f"NOT as promised ({', '.join(promised)})"
            print(f"{name:15} {backend:6}  {'+'.join(found['transports']) or 'unknown':12} {figures}  {word}")
            for line in [*found["rows"], *found["complaints"], *filter(None, [found.get("error")])]:
                print(f"{'':24}{line}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
