"""The console command."""

from __future__ import annotations

import pytest

from pdstack.__main__ import main


def test_a_command_gets_the_words_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["kv-path", "--local", "--prefill", "0"])
    assert ended.value.code == 2
    assert "--prefill, --decode and --rounds must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [([], 2), (["kv-paths"], 2), (["--help"], 0)])
def test_others_are_told_which_there_are(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    assert "kv-path " in capsys.readouterr().err
