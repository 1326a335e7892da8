"""Check a directory that is to be served: a Llama-family model in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pdstack.models.hf_config import ModelConfig, UnsupportedModel
from pdstack.models.weights import Tensor, WeightsError, open_weights, weight_files

__all__ = ["check_directory", "check_tensors", "model_id", "served_files"]

REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")


def check_tensors(directory: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless every tensor that the model needs is there with its shape."""
    for name, shape in config.tensors().items():
        tensor = tensors.get(name)
        if tensor is None:
            raise WeightsError(f"{directory}: tensor {name} is missing; the weights do not belong to config.json")
        if tensor.shape != shape:
            raise WeightsError(f"{directory}: tensor {name} has shape {tensor.shape}, wanted {shape} by config.json")


def check_directory(directory: Path) -> ModelConfig:
    """Check files, configuration and tensors. Raises UnsupportedModel or WeightsError; reads no weights."""
    missing = [name for name in REQUIRED if not (directory / name).is_file()]
    if missing:
        raise UnsupportedModel(
            f"{directory}: found no {', '.join(missing)}; wanted a Hugging Face directory with "
            "config.json, tokenizer.json, tokenizer_config.json and *.safetensors"
        )
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    if "chat_template" not in tokenizer and not (directory / "chat_template.jinja").is_file():
        raise UnsupportedModel(f"{directory}: tokenizer_config.json has no chat_template; use an instruct model")
    config = ModelConfig.load(directory)
    check_tensors(directory, config, open_weights(directory))
    return config


def served_files(directory: Path) -> list[Path]:
    """The files of a checked directory that serving needs; everything else in it may stay behind."""
    small = [directory / name for name in (*REQUIRED, *OPTIONAL) if (directory / name).is_file()]
    index = directory / "model.safetensors.index.json"
    return small + ([index] if index.is_file() else []) + weight_files(directory)


def model_id(directory: Path) -> str:
    """Short identity of the weights, 16 hex digits: equal directories agree without reading all of them.

    Covers config.json and of each weight file the size and 64 KiB at the start (the header), middle and end.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - 65536)):
                file.seek(offset)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]
