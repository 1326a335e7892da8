from __future__ import annotations

import json

import pytest
from testinfra.host import Host

MODELS = "/var/lib/pdstack/models"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.fixture(scope="module")
def model(host: Host) -> str:
    found = host.file(MODELS).listdir()
    assert len(found) == 1, f"found {found}, wanted the one model"
    return f"{MODELS}/{found[0]}"


@pytest.mark.parametrize("name", FILES)
def test_every_file_can_be_read_by_the_containers_and_written_by_nobody(host: Host, model: str, name: str) -> None:
    file = host.file(f"{model}/{name}")
    assert file.is_file
    assert file.size > 0
    assert file.mode & 0o444 == 0o444
    assert file.mode & 0o022 == 0


def test_it_is_a_llama_with_its_tokeniser(host: Host, model: str) -> None:
    config = json.loads(host.file(f"{model}/config.json").content_string)
    assert config["model_type"] == "llama"
    assert config["vocab_size"] > 0
    tokenizer = json.loads(host.file(f"{model}/tokenizer.json").content_string)
    assert tokenizer["model"]["vocab"]
    assert "chat_template" in json.loads(host.file(f"{model}/tokenizer_config.json").content_string)


def test_the_weights_are_whole(host: Host, model: str) -> None:
    """The header of a safetensors file says where its last tensor ends."""
    script = (
        f"import json, os, struct; p = '{model}/model.safetensors'; f = open(p, 'rb'); "
        "n = struct.unpack('<Q', f.read(8))[0]; h = json.loads(f.read(n)); h.pop('__metadata__', None); "
        "print(8 + n + max(t['data_offsets'][1] for t in h.values()) == os.path.getsize(p))"
    )
    assert host.check_output(f'python3 -c "{script}"').strip() == "True"


def test_a_model_is_fetched_as_the_containers_user_with_the_token_and_leaves_none(host: Host) -> None:
    told = json.loads(host.file("/srv/models/hub/told.json").content_string)
    assert (told["repository"], told["revision"][:8]) == ("owner/name", "01234567")
    assert (told["uid"], told["token"], told["endpoint"]) == (1000, "hf_molecule", "http://hub.invalid")
    assert "*.gguf" in told["ignore"]
    assert set(host.file("/srv/models").listdir()) == {"hub", "site"}
