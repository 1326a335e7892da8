"""A tiny random Llama for tests: made in a moment, the same bytes everywhere, no network, no weights to ship.

    python -m pdstack.models.tiny --out DIR

Its words are the 256 bytes. Weights come from numpy's frozen MT19937 stream, with a spread (1.6 / sqrt(inputs)) that
makes greedy output wander instead of repeating one token. Only printable ASCII and the end token can win, so text and
tokens say the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdstack.models.hf_config import ModelConfig
from pdstack.models.manifest import write_manifest
from pdstack.models.weights import write_safetensors

__all__ = ["write_tiny_model"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 352,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}


def byte_alphabet() -> list[str]:
    """The character that byte-level tokenizers write for each byte 0..255: itself if printable, else one above 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _tokenizer() -> dict[str, Any]:
    words = [*SPECIAL, *byte_alphabet()]
    # Ids up to VOCABULARY exist in the weights; unnamed ones never come out.
    vocabulary = {word: index for index, word in enumerate(words)}
    return tokenizer_json(vocabulary, [], {word: vocabulary[word] for word in SPECIAL}, digits=False)


def tokenizer_json(
    vocabulary: dict[str, int], merges: list[list[str]], special: dict[str, int], *, digits: bool
) -> dict[str, Any]:
    """A byte-level BPE tokenizer as Hugging Face's tokenizers library stores it. digits: split numbers into digits."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split: dict[str, Any] = byte_level
    if digits:
        split = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for word, index in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def tokenizer_config(special: dict[str, int], bos: str, eos: str, unk: str, pad: str, template: str) -> dict[str, Any]:
    """tokenizer_config.json for such a tokenizer."""
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {
                "content": word,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for word, index in sorted(special.items(), key=lambda item: item[1])
        },
        "bos_token": bos,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": 8192,
        "pad_token": pad,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": unk,
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON whose bytes depend on the value alone."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _weights(config: ModelConfig, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    stream = np.random.RandomState(seed)
    for name, shape in config.tensors().items():
        if len(shape) == 1:
            yield np.ones(shape, dtype=np.float32)
            continue
        spread = 1.0 if name.startswith("model.embed") else 1.6 / np.sqrt(shape[1])
        value = (stream.standard_normal(shape) * spread).astype(np.float32)
        if name == "lm_head.weight":
            words = len(SPECIAL)
            shown = np.zeros(shape[0], dtype=bool)
            shown[words + 32 : words + 127] = True
            shown[2] = True
            value[~shown] = 0.0
        yield value


def write_tiny_model(directory: Path, seed: int = 20) -> Path:
    """Write the model into `directory` (made if missing) and return it. Same seed, same bytes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    special = {word: index for index, word in enumerate(SPECIAL)}
    write_json(directory / "config.json", CONFIG)
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0})
    write_json(directory / "tokenizer.json", _tokenizer())
    write_json(
        directory / "tokenizer_config.json",
        tokenizer_config(special, SPECIAL[1], SPECIAL[2], SPECIAL[0], SPECIAL[0], CHAT_TEMPLATE),
    )
    config = ModelConfig.load(directory)
    write_safetensors(directory / "model.safetensors", config.tensors(), _weights(config, seed))
    write_manifest(directory, {"kind": "tiny", "seed": seed})
    return directory


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pdstack.models.tiny", description="Write a tiny random Llama.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=20)
    chosen = parser.parse_args(arguments)
    write_tiny_model(chosen.out, chosen.seed)


if __name__ == "__main__":
    main()
