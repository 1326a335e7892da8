"""What a Hugging Face `config.json` says about a Llama-family model, and whether this engine can run it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ModelConfig", "UnsupportedModel"]


class UnsupportedModel(ValueError):
    """The engine can not run this model; the text names the key of config.json, what was found and wanted."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama-family model."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tied: bool
    eos_token_ids: frozenset[int]

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read `directory`/config.json and, for the end tokens, generation_config.json. Raises UnsupportedModel."""
        path = directory / "config.json"
        if not path.is_file():
            raise UnsupportedModel(f"{path}: not found; wanted a Hugging Face model directory")
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise UnsupportedModel(f"{path}: no JSON: {error}") from None

        def refuse(key: str, wanted: str) -> UnsupportedModel:
            return UnsupportedModel(f"{path}: {key} is {raw.get(key)!r}, wanted {wanted}; choose a Llama-family model")

        if "LlamaForCausalLM" not in (raw.get("architectures") or ()):
            raise refuse("architectures", "LlamaForCausalLM")
        if raw.get("hidden_act", "silu") != "silu":
            raise refuse("hidden_act", "silu")
        for key in ("attention_bias", "mlp_bias", "quantization_config"):
            if raw.get(key):
                raise refuse(key, "none")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(raw.get(key), int) or raw[key] < 1:
                raise refuse(key, "a whole number of at least 1")
        heads = int(raw["num_attention_heads"])
        kv_heads = int(raw.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise refuse("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
        head_dim = int(raw.get("head_dim") or raw["hidden_size"] // heads)
        if head_dim % 2:
            raise refuse("head_dim", "an even number")
        # Older files hold rope_theta and rope_scaling, newer ones both in rope_parameters.
        rope: dict[str, Any] = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise refuse("rope_scaling" if raw.get("rope_scaling") else "rope_parameters", "default, linear or llama3")
        return cls(
            vocab_size=int(raw["vocab_size"]),
            hidden=int(raw["hidden_size"]),
            intermediate=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_context=int(raw.get("max_position_embeddings", 2048)),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=None if kind == "default" else {**rope, "rope_type": kind},
            tied=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=_eos(directory, raw),
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order that lets q, k, v and gate, up be used as one matrix each."""
        kv, attention = self.kv_heads * self.head_dim, self.heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes[at + "self_attn.q_proj.weight"] = (attention, self.hidden)
            shapes[at + "self_attn.k_proj.weight"] = (kv, self.hidden)
            shapes[at + "self_attn.v_proj.weight"] = (kv, self.hidden)
            shapes[at + "self_attn.o_proj.weight"] = (self.hidden, attention)
            shapes[at + "mlp.gate_proj.weight"] = (self.intermediate, self.hidden)
            shapes[at + "mlp.up_proj.weight"] = (self.intermediate, self.hidden)
            shapes[at + "mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            shapes[at + "input_layernorm.weight"] = (self.hidden,)
            shapes[at + "post_attention_layernorm.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        return shapes

    def inverse_frequencies(self) -> npt.NDArray[np.float64]:
        """Rotary angle per position for each of the head_dim / 2 pairs, in radians."""
        half = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        inverse: npt.NDArray[np.float64] = self.rope_theta**-half
        scaling = self.rope_scaling
        if scaling is None:
            return inverse
        factor = float(scaling["factor"])
        if scaling["rope_type"] == "linear":
            return inverse / factor
        # Llama 3: long waves are stretched, short ones kept, those between blended.
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = float(scaling["original_max_position_embeddings"]) * inverse / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        blended: npt.NDArray[np.float64] = inverse * keep + inverse / factor * (1.0 - keep)
        return blended


def _eos(directory: Path, config: dict[str, Any]) -> frozenset[int]:
    path = directory / "generation_config.json"
    generation: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        return frozenset()
    return frozenset(int(token) for token in (value if isinstance(value, list) else [value]))
