from __future__ import annotations

from pathlib import Path

import pytest

from pdstack.deploy import roledocs

SPEC = """---
argument_specs:
  remove:
    short_description: Take it away.
  main:
    short_description: Run it.
    description:
      - First it looks.
      - Then it runs.
    options:
      demo__spec:
        type: dict
        required: true
        description: What to run.
        options:
          mode:
            type: str
            choices: [a, b]
            default: a
            description: How | where.
      demo__ports:
        type: list
        elements: int
        default: [80]
        description: Where it listens.
"""


@pytest.fixture
def role(tmp_path: Path) -> Path:
    role = tmp_path / "demo"
    for folder in ("tasks", "meta", "defaults"):
        (role / folder).mkdir(parents=True)
    (role / "meta" / "argument_specs.yml").write_text(SPEC)
    (role / "meta" / "main.yml").write_text("---\ngalaxy_info:\n  description: A demo.\n")
    (role / "defaults" / "main.yml").write_text("---\ndemo__ports: [80]\n")
    return role


def test_the_readme_says_what_the_specs_say(role: Path) -> None:
    readme = roledocs.render(role)
    assert readme.startswith("# demo\n")
    assert "A demo." in readme
    assert "`main`: First it looks. Then it runs." in readme
    assert "| `demo__ports` | list of int | `[80]` | main | Where it listens. |" in readme
    assert "| `demo__spec` | dict | required | main | What to run. |" in readme
    assert "Keys of `demo__spec`:" in readme
    assert '| `mode` | str | `"a"` | How \\| where. One of `"a"`, `"b"`. |' in readme
    assert readme.endswith("|\n")


def test_main_comes_first(role: Path) -> None:
    readme = roledocs.render(role)
    assert readme.index("| `main` | Run it. |") < readme.index("| `remove` | Take it away. |")


def test_a_variable_of_several_entry_points_is_described_once(role: Path) -> None:
    path = role / "meta" / "argument_specs.yml"
    entry = SPEC[SPEC.index("    short_description: Run it.") :]
    path.write_text(f"{SPEC}  run:\n{entry}")
    readme = roledocs.render(role)
    assert readme.count("| `mode` |") == 1
    assert "| `demo__ports` | list of int | `[80]` | main, run | Where it listens. |" in readme


def test_check_fails_until_written_and_writes_nothing(role: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roles = ["--roles", str(role.parent)]
    assert roledocs.main(["--check", *roles]) == 1
    assert not (role / "README.md").exists()
    assert "stale" in capsys.readouterr().err
    assert roledocs.main(roles) == 0
    assert roledocs.main(["--check", *roles]) == 0


def test_a_changed_spec_makes_the_readme_stale(role: Path) -> None:
    roledocs.main(["--roles", str(role.parent)])
    path = role / "meta" / "argument_specs.yml"
    path.write_text(path.read_text().replace("Where it listens.", "Where it answers."))
    assert roledocs.main(["--check", "--roles", str(role.parent)]) == 1
