"""What a base image is bootstrapped from: the host's own apt configuration, read and condensed.

A host that can install packages can also bootstrap an image: it knows a mirror, the keys that sign it and the way
there. Nothing else names a mirror, so a base image needs no registry and no address in this project.
Formats: sources.list(5), both the one-line style and deb822; `apt-config dump`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

INLINE_KEY = "-----BEGIN"
# Options of apt's transport that an apt inside the new root file system needs too, to reach what the host reaches.
FORWARDED = re.compile(
    r"Acquire::(?:(?:http|https|ftp)::Proxy(?:::[\w.-]+)?|Check-Valid-Until|Check-Date|Retries|http::Timeout)"
)


class AptSourcesError(ValueError):
    """The host's apt configuration does not say where to bootstrap from; the text says what was found and wanted."""


@dataclass(frozen=True)
class Source:
    """One entry of the apt configuration: every URI is combined with every suite."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    trusted: bool = False
    architectures: tuple[str, ...] = ()
    origin: str = ""


class BasePlan(TypedDict):
    """From what, and how checked, a base image is made. `sources` is a deb822 text for an apt inside it."""

    mirror: str
    suite: str
    components: list[str]
    keyring: str
    trusted: bool
    sources: str
    keyrings: list[str]
    found_in: str


def parse(files: Mapping[str, str]) -> list[Source]:
    """Return the binary-package entries of apt source files (path -> text), in the order of the files.

    Paths that end in `.sources` are deb822, all others the one-line style; disabled and deb-src entries are left out.
    """
    found: list[Source] = []
    for path, text in files.items():
        found += deb822(text, path) if path.endswith(".sources") else one_line(text, path)
    return found


def one_line(text: str, origin: str) -> Iterator[Source]:
    """Yield the entries of the style `deb [option=value ...] uri suite component ...`."""
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        match = re.fullmatch(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<rest>\S.*)", line)
        if match is None:
            continue
        words = match["rest"].split()
        if len(words) < 2:
            continue
        options = dict(word.split("=", 1) for word in (match["options"] or "").split() if "=" in word)
        yield Source(
            uris=(words[0],),
            suites=(words[1],),
            components=tuple(words[2:]),
            signed_by=options.get("signed-by", ""),
            trusted=options.get("trusted", "") == "yes",
            architectures=tuple(filter(None, options.get("arch", "").split(","))),
            origin=origin,
        )


def deb822(text: str, origin: str) -> Iterator[Source]:
    """Yield the entries of the deb822 style: stanzas of fields, a value going on in lines that start with a space."""
    for stanza in stanzas(text):
        if "deb" not in stanza.get("types", "").split() or stanza.get("enabled", "yes").lower() in {"no", "false"}:
            continue
        yield Source(
            uris=tuple(stanza.get("uris", "").split()),
            suites=tuple(stanza.get("suites", "").split()),
            components=tuple(stanza.get("components", "").split()),
            signed_by=stanza.get("signed-by", ""),
            trusted=stanza.get("trusted", "").lower() in {"yes", "true"},
            architectures=tuple(stanza.get("architectures", "").split()),
            origin=origin,
        )


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a deb822 text, names in lower case; in a value a line with only a dot is an empty line."""
    fields: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t" and name:
            value = line.strip()
            fields[name] = f"{fields[name]}\n{'' if value == '.' else value}".lstrip("\n")
        elif ":" in line:
            name, value = line.split(":", 1)
            name = name.strip().lower()
            fields[name] = value.strip()


def resolve(uri: str, mirror_lists: Mapping[str, str]) -> str:
    """Return a plain http(s), file or copy URI; a `mirror+file:` one is looked up in the texts of the mirror lists."""
    if uri.startswith("mirror+file:"):
        path = "/" + uri.removeprefix("mirror+file:").lstrip("/")
        lines = [line.split("#", 1)[0].split() for line in mirror_lists.get(path, "").splitlines()]
        uri = next((words[0] for words in lines if words), "")
    return uri.rstrip("/") if re.match(r"(https?|file|copy|ftp):", uri) else ""


def plan(
    files: Mapping[str, str], *, suite: str, architecture: str, mirror: str = "", extra_components: str = ""
) -> BasePlan:
    """Return where to bootstrap `suite` (a codename such as bookworm) from.

    `files` holds the apt source files and the mirror lists they name (path -> text), `architecture` is apt's word
    (amd64). `mirror` overrides the URI that is found. Raises AptSourcesError when no entry serves the suite.
    """
    lists = {path: text for path, text in files.items() if path.startswith("/etc/apt/mirrors/")}
    entries = [
        entry
        for entry in parse({path: text for path, text in files.items() if path not in lists})
        if not entry.architectures or architecture in entry.architectures
    ]
    base = [e for e in entries if suite in e.suites and "main" in e.components]
    uri = mirror or next((u for e in base for u in (resolve(x, lists) for x in e.uris) if u), "")
    if not uri:
        seen = "; ".join(f"{e.origin}: {' '.join((*e.uris, *e.suites, *e.components))}" for e in entries) or "none"
        raise AptSourcesError(
            f"the apt sources of this host were searched for the main component of suite {suite!r} ({architecture}); "
            f"found {seen}; wanted one entry with it. Add it to the host's apt sources, or set images__mirror"
        )
    chosen = base[0] if base else Source((uri,), (suite,), ("main",))
    components = [c for c in chosen.components if c in {"main", "universe", *extra_components.split()}]
    related = [e for e in entries if any(s == suite or s.startswith((f"{suite}-", f"{suite}/")) for s in e.suites)]
    signers = [e.signed_by for e in related if e.signed_by]
    return {
        "mirror": uri,
        "suite": suite,
        "components": components or ["main"],
        "keyring": "" if chosen.signed_by.startswith(INLINE_KEY) else chosen.signed_by.split("\n")[0],
        "trusted": chosen.trusted,
        "sources": sources_text(related, lists, suite)
        if related
        else f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n",
        "keyrings": list(dict.fromkeys(signers)),
        "found_in": chosen.origin,
    }


def sources_text(entries: list[Source], mirror_lists: Mapping[str, str], suite: str) -> str:
    """Return the entries as deb822, without signers: inside a new root file system their paths mean nothing."""
    parts = []
    for entry in entries:
        uris = [u for u in (resolve(x, mirror_lists) for x in entry.uris) if u]
        suites = [s for s in entry.suites if s == suite or s.startswith((f"{suite}-", f"{suite}/"))]
        suites = [s for s in suites if "backports" not in s and "proposed" not in s]
        components = [c for c in entry.components if c in {"main", "universe"}]
        if uris and suites and components:
            trusted = "Trusted: yes\n" if entry.trusted else ""
            parts.append(
                f"Types: deb\nURIs: {' '.join(uris)}\nSuites: {' '.join(suites)}\n"
                f"Components: {' '.join(components)}\n{trusted}"
            )
    return "\n".join(parts)


def apt_options(dump: str) -> list[str]:
    """Return the `-o` arguments that make another apt reach the mirror as this host does, from `apt-config dump`."""
    arguments: list[str] = []
    for name, value in settings(dump):
        if FORWARDED.fullmatch(name) and value:
            arguments += ["-o", f"{name}={value}"]
    return arguments


def proxy_environment(dump: str) -> dict[str, str]:
    """Return http_proxy and https_proxy as apt has them; debootstrap downloads with wget, which knows only these."""
    words = {"Acquire::http::Proxy": "http_proxy", "Acquire::https::Proxy": "https_proxy"}
    return {words[name]: value for name, value in settings(dump) if name in words and value not in {"", "DIRECT"}}


def settings(dump: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of each line of `apt-config dump`."""
    for line in dump.splitlines():
        match = re.fullmatch(r'(\S+) "(.*)";', line)
        if match:
            yield match[1], match[2]


def from_slurp(results: list[Mapping[str, Any]], decode: Any) -> dict[str, str]:
    """Return path -> text of the results of a loop over Ansible's slurp module; `decode` turns base64 into text."""
    return {str(result["source"]): str(decode(result["content"])) for result in results if "content" in result}
