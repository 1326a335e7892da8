"""The same model in the plainest way: whole sequences, ordinary attention, float64, no cache. What is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from pdstack.models.hf_config import ModelConfig

Array = npt.NDArray[np.float64]


class PlainModel:
    def __init__(self, directory: Path) -> None:
        self.config = ModelConfig.load(directory)
        self.weights = {
            name: value.astype(np.float64) for name, value in load_file(directory / "model.safetensors").items()
        }

    def logits(self, tokens: list[int]) -> Array:
        """(tokens, vocabulary)"""
        cfg, count = self.config, len(tokens)
        angles = np.arange(count)[:, None] * cfg.inverse_frequencies()
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

        def norm(x: Array, name: str) -> Array:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * self.weights[name]

        def times(x: Array, name: str) -> Array:
            return x @ self.weights[name].T

        def turn(x: Array) -> Array:
            first, second = np.split(x, 2, axis=-1)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(cfg.layers):
            at = f"model.layers.{layer}."
            h = norm(x, at + "input_layernorm.weight")
            q = turn(times(h, at + "self_attn.q_proj.weight").reshape(count, cfg.heads, cfg.head_dim))
            k = turn(times(h, at + "self_attn.k_proj.weight").reshape(count, cfg.kv_heads, cfg.head_dim))
            v = times(h, at + "self_attn.v_proj.weight").reshape(count, cfg.kv_heads, cfg.head_dim)
            outputs = []
            for head in range(cfg.heads):
                own = head * cfg.kv_heads // cfg.heads
                scores = q[:, head] @ k[:, own].T / np.sqrt(cfg.head_dim)
                scores[np.triu_indices(count, 1)] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
            x = x + times(np.concatenate(outputs, axis=-1), at + "self_attn.o_proj.weight")
            h = norm(x, at + "post_attention_layernorm.weight")
            gate = times(h, at + "mlp.gate_proj.weight")
            x = x + times(gate / (1 + np.exp(-gate)) * times(h, at + "mlp.up_proj.weight"), at + "mlp.down_proj.weight")
        head = "model.embed_tokens.weight" if cfg.tied else "lm_head.weight"
        return norm(x, "model.norm.weight") @ self.weights[head].T

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        found = list(tokens)
        for _ in range(count):
            found.append(int(self.logits(found)[-1].argmax()))
        return found[len(tokens) :]
