"""What can be known to be wrong with the TensorRT-LLM workers of an inventory, before any host is touched.

Most of it would show after minutes of loading a model, or never: a worker that ends with a stack trace, a decode worker
that waits for KV in another layout, a transfer that fails for long prompts only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pdstack.deploy import fabrics, trtllm, trtllm_fields
from pdstack.deploy.problem import Problem, show
from pdstack.deploy.schema import Field, closest
from pdstack.deploy.topology import RANK_PORTS, ROLES, worker_items

COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PARTS = ("common", *ROLES)


@dataclass(frozen=True)
class Entry:
    """One entry of prefill_workers or decode_workers: `what` names it, `config` is its engine's YAML."""

    what: str
    role: str
    host: str
    gpus: tuple[int, ...]
    item: Mapping[str, Any]
    config: Mapping[str, Any]


def problems(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Problem]:
    """Return every problem of the workers; empty with another engine.

    `groups` maps a group to its hosts, `hosts` a host to its variables, `settings` is `pdstack_settings`. Types of the
    settings themselves and the keys of an entry are checked by `pdstack.deploy.validate`.
    """
    if settings.get("engine") != "trtllm":
        return []
    found = [*_model(settings), *_shared_engine(settings), *_options("trtllm_args", settings.get("trtllm_args"))]
    found += _template("trtllm_args", settings.get("trtllm_args"), settings)
    for what, item in _items(groups, hosts):
        found += _engine(f"{what}.engine", item.get("engine"))
        found += _options(f"{what}.args", item.get("args"))
        found += _template(f"{what}.args", item.get("args"), settings)
        found += _environment(f"{what}.env", item.get("env"), settings)
    sound = not found
    try:
        entries = [*_entries(groups, hosts, settings)]
    except (AttributeError, KeyError, TypeError, ValueError):
        # A setting of the wrong type, which is told where types are checked.
        return found
    found += [*_gpus(entries, groups, hosts)]
    # What follows reads the engines' settings, and means something only where they are right by themselves.
    if sound:
        for entry in entries:
            found += [*_parallel(entry), *_transfer(entry, settings), *_lengths(entry, settings), *_batches(entry)]
            found += _routing(entry, settings)
        found += _alike(entries, settings)
    return found


def _items(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for role in ROLES:
        for host in groups.get(role, ()):
            for position, item in enumerate(worker_items(hosts[host], role)):
                yield f"{role}_workers[{position}] on {host}", item


def _entries(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Entry]:
    for role in ROLES:
        for host in groups.get(role, ()):
            for position, item in enumerate(worker_items(hosts[host], role)):
                gpus = tuple(int(gpu) for gpu in item.get("gpus") or ())
                config = trtllm.engine_config(
                    role, item.get("engine") or {}, len(gpus),
                    defaults=settings["trtllm_engine_defaults"], site=settings.get("trtllm_engine") or {},
                    backend=settings["kv_transfer_backend"], max_input_tokens=int(settings["trtllm_max_input_tokens"]),
                    timeout_ms=int(settings["kv_transfer_timeout_ms"]),
                )  # fmt: skip
                yield Entry(f"{role}_workers[{position}] on {host}", role, host, gpus, item, config)


# --- the model ----------------------------------------------------------------------------------------------------
def _model(settings: Mapping[str, Any]) -> Iterator[Problem]:
    source, ref = settings.get("model_source"), str(settings.get("model_ref") or "")
    revision = str(settings.get("model_revision") or "")
    if source == "hub":
        if ref and not REPOSITORY.fullmatch(ref):
            yield Problem(
                "model_ref (model_source is hub)", show(ref), "a repository, owner/name",
                "set model_ref, for example Qwen/Qwen3-0.6B; for a directory of the hosts set model_source: path",
            )  # fmt: skip
        if not COMMIT.fullmatch(revision):
            yield Problem(
                "model_revision (model_source is hub)", show(revision), "a commit, 40 hex digits",
                "set the commit of model_ref: a branch moves, and two hosts would hold different weights",
            )  # fmt: skip
    elif source == "path" and ref and not PurePosixPath(ref).is_absolute():
        yield Problem(
            "model_ref (model_source is path, engine is trtllm)", show(ref),
            "an absolute path of the GPU hosts and frontends",
            "write the whole path: the directory is mounted into the containers where it lies",
        )  # fmt: skip


# --- keys and types -----------------------------------------------------------------------------------------------
def _shared_engine(settings: Mapping[str, Any]) -> Iterator[Problem]:
    for name in ("trtllm_engine_defaults", "trtllm_engine"):
        parts = settings.get(name)
        if isinstance(parts, Mapping):
            for part in PARTS:
                yield from _engine(f"{name}.{part}", parts.get(part))


def _engine(what: str, value: object) -> Iterator[Problem]:
    if isinstance(value, Mapping):
        yield from _table(what, "", value, trtllm_fields.ENGINE)


def _table(what: str, above: str, value: Mapping[str, Any], table: trtllm_fields.Table) -> Iterator[Problem]:
    for key, item in value.items():
        path = f"{above}{key}"
        field = table.get(str(key))
        if path in trtllm_fields.REFUSED:
            reason, fix = trtllm_fields.REFUSED[path]
            yield Problem(f"{what}.{path}", "a key that has no place here", f"nothing: {reason}", fix)
        elif field is None:
            yield Problem(
                f"{what}.{path}", "an unknown key",
                f"a field of TensorRT-LLM 1.2.0rc3{f' in {above[:-1]}' if above else ''}: it refuses any other",
                f"remove it or correct its spelling{closest(str(key), list(table))}",
            )  # fmt: skip
        elif item is None:
            if path not in trtllm_fields.NULLABLE:
                yield Problem(f"{what}.{path}", "nothing", "a value", "give it a value, or remove the key")
        elif isinstance(field, Field):
            if (wrong := field.wrong(item)) is not None:
                yield Problem(f"{what}.{path}", show(item), wrong, f"correct {what}.{path}{_hint(item, field)}")
        elif not isinstance(item, Mapping):
            yield Problem(
                f"{what}.{path}", show(item), f"a mapping with keys of {', '.join(field)}", f"write {path} so"
            )
        else:
            yield from _table(what, f"{path}.", item, field)


def _hint(value: object, field: Field) -> str:
    return closest(str(value), field.choices) if field.choices else ""


def _options(what: str, value: object) -> Iterator[Problem]:
    if not isinstance(value, Mapping):
        return
    for name, item in value.items():
        plain = str(name).removeprefix("--").replace("-", "_")
        field = trtllm_fields.OPTIONS.get(str(name))
        if plain in trtllm_fields.REFUSED_OPTIONS:
            reason, fix = trtllm_fields.REFUSED_OPTIONS[plain]
            yield Problem(f"{what}.{name}", "an option that has no place here", f"nothing: {reason}", fix)
        elif field is None:
            known = [*trtllm_fields.OPTIONS]
            hint = f" (did you mean {plain!r}?)" if plain in known else closest(plain, known)
            yield Problem(
                f"{what}.{name}", "an unknown option", f"one of {', '.join(known)}",
                f"remove it or correct its spelling{hint}",
            )  # fmt: skip
        elif (wrong := field.wrong(item)) is not None:
            yield Problem(f"{what}.{name}", show(item), wrong, f"correct {what}.{name}{_hint(item, field)}")


def _template(what: str, value: object, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """A worker ends when its chat template is not there, and its container has the model's directory alone."""
    path = value.get("custom_jinja_template") if isinstance(value, Mapping) else None
    directory = settings.get("model_ref")
    if settings.get("model_source") != "path" or not isinstance(path, str) or not isinstance(directory, str):
        return
    if not PurePosixPath(path).is_relative_to(directory):
        yield Problem(
            f"{what}.custom_jinja_template", show(path), f"a file below {directory} (model_ref)",
            "put the template into the model's directory on every host: the container has no other",
        )  # fmt: skip


def _environment(what: str, value: object, settings: Mapping[str, Any]) -> Iterator[Problem]:
    if not isinstance(value, Mapping):
        return
    env = {str(key): str(item) for key, item in value.items()}
    yield from fabrics.worker_problems(what, env)
    for key in env:
        if key in trtllm_fields.REFUSED_ENV:
            reason, fix = trtllm_fields.REFUSED_ENV[key]
            yield Problem(f"{what}.{key}", show(env[key]), f"nothing: {reason}", fix)
    if env.get("DYN_HEALTH_CHECK_ENABLED", "").lower() in ("1", "true"):
        yield Problem(
            f"{what}.DYN_HEALTH_CHECK_ENABLED", show(env["DYN_HEALTH_CHECK_ENABLED"]),
            "nothing: its request has no prefill behind it, decode workers fail it and are taken for broken",
            "remove it; nox -s verify sends requests that go the whole way",
        )  # fmt: skip
    size = env.get("TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE", "")
    if settings.get("kv_transfer_backend") == "nixl" and re.fullmatch(r"0+[A-Za-z]*", size):
        yield Problem(
            f"{what}.TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE", show(size), "a buffer: NIXL fails with one made as needed",
            "remove it (512MB is the default), or set kv_transfer_backend: ucx",
        )  # fmt: skip
    tls = env.get("UCX_TLS", "")
    if tls and not tls.startswith("^") and not {"all", "cuda", "cuda_copy"} & set(tls.split(",")):
        yield Problem(
            f"{what}.UCX_TLS", show(tls), "cuda among the transports",
            "add cuda, or choose another kv_fabric: without it UCX takes GPU memory for memory of the host",
        )  # fmt: skip


def whole(value: object) -> bool:
    """Say whether a value is a whole number; those that Ansible hands over are of a class of their own."""
    return isinstance(value, int) and not isinstance(value, bool)


# --- GPUs ---------------------------------------------------------------------------------------------------------
def _gpus(
    entries: Sequence[Entry], groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]]
) -> Iterator[Problem]:
    for host in dict.fromkeys(host for role in ROLES for host in groups.get(role, ())):
        count = hosts[host].get("gpu_count")
        here = [entry for entry in entries if entry.host == host]
        if not whole(count):
            yield Problem(
                f"gpu_count on {host}", show(count), "the number of GPUs in the host",
                f"set gpu_count for {host} in the inventory (`nvidia-smi -L | wc -l`)",
            )  # fmt: skip
        taken: dict[int, str] = {}
        for entry in here:
            yield from _own_gpus(entry, count if whole(count) else None)
            for gpu in dict.fromkeys(entry.gpus):
                if other := taken.get(gpu):
                    yield Problem(
                        f"GPU {gpu} of {host}", f"two workers: {other} and {entry.what}", "one worker on a GPU",
                        "give one of them another GPU; both would claim its free memory for their KV cache",
                    )  # fmt: skip
                taken.setdefault(gpu, entry.what)


def _own_gpus(entry: Entry, count: int | None) -> Iterator[Problem]:
    what = f"{entry.what}.gpus"
    if not entry.gpus:
        yield Problem(what, "no GPU", "the GPUs of the worker, for example [0]", f"set gpus in {entry.what}")
    if len(set(entry.gpus)) != len(entry.gpus):
        yield Problem(what, show(list(entry.gpus)), "each GPU once", "name other GPUs, or fewer")
    if len(entry.gpus) > RANK_PORTS:
        yield Problem(what, f"{len(entry.gpus)} GPUs", f"at most {RANK_PORTS}", "make two workers of it")
    beyond = [gpu for gpu in entry.gpus if count is not None and gpu >= count]
    if beyond:
        last = f"0 to {count - 1}" if count and count > 1 else "0"
        yield Problem(
            what, f"GPU {', '.join(map(str, beyond))}", f"{last} (gpu_count on {entry.host} is {count})",
            "count from 0, as nvidia-smi does; correct gpus, or gpu_count if the host has more",
        )  # fmt: skip


def _parallel(entry: Entry) -> Iterator[Problem]:
    sizes = {
        name: int(entry.config.get(f"{name}_parallel_size") or 1) for name in ("tensor", "pipeline", "context")
    }  # fmt: skip
    product = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    if entry.gpus and product != len(entry.gpus):
        said = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "tensor")
        yield Problem(
            f"{entry.what}: parallel sizes", f"{said} = {product} ranks for {len(entry.gpus)} GPUs", "one GPU a rank",
            f"name {product} GPUs in gpus, or set tensor_parallel_size to "
            f"{max(1, len(entry.gpus) // max(1, product // sizes['tensor']))}",
        )  # fmt: skip


# --- moving KV ----------------------------------------------------------------------------------------------------
def _transfer(entry: Entry, settings: Mapping[str, Any]) -> Iterator[Problem]:
    transceiver = entry.config["cache_transceiver_config"]
    what = f"{entry.what}: cache_transceiver_config"
    wanted = str(settings["kv_transfer_backend"]).upper()
    if transceiver.get("backend") != wanted:
        yield Problem(
            f"{what}.backend", show(transceiver.get("backend")), f"{wanted} on both sides (kv_transfer_backend)",
            "remove it from the engine's settings and set kv_transfer_backend: the two sides must speak alike",
        )  # fmt: skip
    longest, buffer = int(settings["trtllm_max_input_tokens"]), transceiver.get("max_tokens_in_buffer")
    if buffer < longest:
        yield Problem(
            f"{what}.max_tokens_in_buffer", str(buffer), f"{longest} or more (trtllm_max_input_tokens)",
            f"set it to {longest}, or lower trtllm_max_input_tokens: a longer prompt fails to move",
        )  # fmt: skip
    if entry.role == "prefill" and entry.config["disable_overlap_scheduler"] is not True:
        yield Problem(
            f"{entry.what}: disable_overlap_scheduler", "False", "true on prefill",
            "set it under decode only: a worker that only prefills cannot overlap",
        )  # fmt: skip
    if int(entry.config.get("max_beam_width") or 1) > 1:
        yield Problem(
            f"{entry.what}: max_beam_width", str(entry.config["max_beam_width"]), "1",
            "remove it: KV moves between workers for one beam only",
        )  # fmt: skip


def _lengths(entry: Entry, settings: Mapping[str, Any]) -> Iterator[Problem]:
    longest = int(settings["trtllm_max_input_tokens"])
    sequence, step = entry.config.get("max_seq_len"), entry.config.get("max_num_tokens")
    if sequence is not None and sequence <= longest:
        yield Problem(
            f"{entry.what}: max_seq_len", str(sequence),
            f"more than {longest} (trtllm_max_input_tokens): prompt and answer",
            "raise max_seq_len, or lower trtllm_max_input_tokens",
        )  # fmt: skip
    if (
        step is not None
        and not entry.config.get("enable_chunked_prefill")
        and entry.role == "prefill"
        and step < longest
    ):
        yield Problem(
            f"{entry.what}: max_num_tokens", f"{step}, and prompts are not chunked",
            f"{longest} or more (trtllm_max_input_tokens)", "set enable_chunked_prefill: true, or raise max_num_tokens",
        )  # fmt: skip
    limit = (entry.config.get("kv_cache_config") or {}).get("max_tokens")
    if limit is not None and limit < longest:
        yield Problem(
            f"{entry.what}: kv_cache_config.max_tokens", str(limit), f"{longest} or more (trtllm_max_input_tokens)",
            "raise it, or remove it: free_gpu_memory_fraction decides then",
        )  # fmt: skip


def _batches(entry: Entry) -> Iterator[Problem]:
    graphs = entry.config.get("cuda_graph_config") or {}
    if graphs.get("batch_sizes") and graphs.get("max_batch_size"):
        yield Problem(
            f"{entry.what}: cuda_graph_config", "batch_sizes and max_batch_size", "one of them",
            "remove one (max_batch_size: 0 takes the default's back): TensorRT-LLM refuses both",
        )  # fmt: skip
    batch, step = entry.config.get("max_batch_size"), entry.config.get("max_num_tokens")
    if batch and step and batch > step:
        yield Problem(
            f"{entry.what}: max_batch_size", str(batch), f"at most max_num_tokens ({step})",
            "lower max_batch_size: every request takes a token of a step at least",
        )  # fmt: skip


def _routing(entry: Entry, settings: Mapping[str, Any]) -> Iterator[Problem]:
    given = {**(settings.get("trtllm_args") or {}), **(entry.item.get("args") or {})}
    publishes = given.get("publish_events_and_metrics")
    if settings.get("router_mode") != "kv" or entry.role != "prefill":
        return
    if publishes is False:
        yield Problem(
            f"{entry.what}: publish_events_and_metrics", "False", "true (router_mode is kv)",
            "remove it, or set another router_mode: the router would know of no block",
        )  # fmt: skip
    if not entry.config["kv_cache_config"].get("enable_block_reuse", True):
        yield Problem(
            f"{entry.what}: kv_cache_config.enable_block_reuse", "False", "true (router_mode is kv)",
            "remove it, or set router_mode: round-robin: without reuse there is nothing to route by",
        )  # fmt: skip


def _alike(entries: Sequence[Entry], settings: Mapping[str, Any]) -> Iterator[Problem]:
    """KV is taken over as it lies: block by block, in its type."""
    for path, reason in (
        ("kv_cache_config.dtype", "decode reads the bytes that prefill wrote"),
        ("kv_cache_config.tokens_per_block", "KV moves block by block"),
        ("dtype", "the type of KV follows that of the model"),
    ):
        values = {entry.what: _get(entry.config, path.split(".")) for entry in entries}
        if path == "kv_cache_config.tokens_per_block":
            # The router counts in blocks too, and reads `common`.
            values["the frontend"] = trtllm.block_size(
                settings["trtllm_engine_defaults"], settings.get("trtllm_engine") or {}
            )
        if len(set(map(str, values.values()))) > 1:
            yield Problem(
                f"{path} of the workers", "; ".join(f"{show(value)}: {where}" for value, where in _grouped(values)),
                f"one value for prefill and decode: {reason}", "set it under common, and nowhere else",
            )  # fmt: skip


def _get(config: Mapping[str, Any], path: Iterable[str]) -> Any:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "auto" if value is None else value


def _grouped(values: Mapping[str, Any]) -> list[tuple[Any, str]]:
    found: dict[str, list[str]] = {}
    for where, value in values.items():
        found.setdefault(str(value), []).append(where)
    return [(value, ", ".join(places)) for value, places in found.items()]
