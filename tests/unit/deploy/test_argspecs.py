from __future__ import annotations

from pathlib import Path

import pytest

from pdstack.deploy import argspecs

SPEC = """---
argument_specs:
  main:
    short_description: Run it.
    options:
      demo__port:
        type: int
        default: 80
        description: Where it listens.
      demo__name:
        type: str
        required: true
        description: What it is called.
"""
DEFAULTS = "---\ndemo__port: 80\n"


@pytest.fixture
def role(tmp_path: Path) -> Path:
    role = tmp_path / "demo"
    for folder in ("tasks", "meta", "defaults"):
        (role / folder).mkdir(parents=True)
    (role / "tasks" / "main.yml").write_text("---\n")
    (role / "meta" / "argument_specs.yml").write_text(SPEC)
    (role / "defaults" / "main.yml").write_text(DEFAULTS)
    return role


def spec(role: Path, old: str, new: str) -> None:
    path = role / "meta" / "argument_specs.yml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_role_that_agrees_has_no_problem(role: Path) -> None:
    assert argspecs.check_role(role) == []


def test_a_default_that_differs_is_named_with_both_values(role: Path) -> None:
    spec(role, "default: 80", "default: 81")
    (problem,) = argspecs.check_role(role)
    assert "demo__port" in problem
    assert "81" in problem
    assert "80" in problem


def test_a_default_of_another_type_differs(role: Path) -> None:
    spec(role, "default: 80", "default: true")
    (role / "defaults" / "main.yml").write_text("---\ndemo__port: 1\n")
    assert len(argspecs.check_role(role)) == 1


def test_a_variable_that_no_entry_point_declares_is_found(role: Path) -> None:
    (role / "defaults" / "main.yml").write_text(DEFAULTS + "demo__extra: 1\n__demo__internal: 2\n")
    (problem,) = argspecs.check_role(role)
    assert "demo__extra" in problem


def test_an_option_without_a_default_must_be_required(role: Path) -> None:
    spec(role, "required: true", "required: false")
    (problem,) = argspecs.check_role(role)
    assert "demo__name" in problem
    assert "required: true" in problem


def test_a_required_option_must_not_have_a_default(role: Path) -> None:
    (role / "defaults" / "main.yml").write_text(DEFAULTS + "demo__name: x\n")
    (problem,) = argspecs.check_role(role)
    assert "is required" in problem


def test_an_undeclared_entry_point_is_found_and_a_private_file_is_not(role: Path) -> None:
    (role / "tasks" / "remove.yml").write_text("---\n")
    (role / "tasks" / "_detail.yml").write_text("---\n")
    (problem,) = argspecs.check_role(role)
    assert "tasks/remove.yml" in problem


def test_a_declared_entry_point_without_a_file_is_found(role: Path) -> None:
    (role / "tasks" / "main.yml").unlink()
    assert any("no tasks/main.yml" in problem for problem in argspecs.check_role(role))


def test_a_computed_default_needs_no_copy_in_the_spec_but_a_wrong_copy_is_found(role: Path) -> None:
    (role / "defaults" / "main.yml").write_text('---\ndemo__port: "{{ other | int }}"\n')
    spec(role, "        default: 80\n", "")
    assert argspecs.check_role(role) == []
    spec(role, "type: int\n", 'type: int\n        default: "{{ stranger }}"\n')
    assert len(argspecs.check_role(role)) == 1


def test_a_role_without_specs_is_one_problem(role: Path) -> None:
    (role / "meta" / "argument_specs.yml").unlink()
    assert len(argspecs.check_role(role)) == 1


def test_the_command_fails_on_a_problem_and_says_how_many(role: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert argspecs.main(["--check", "--roles", str(role.parent)]) == 0
    spec(role, "default: 80", "default: 81")
    assert argspecs.main(["--check", "--roles", str(role.parent)]) == 1
    assert "1 roles, 1 problems" in capsys.readouterr().out


def test_a_file_that_is_not_a_mapping_is_an_error(role: Path) -> None:
    (role / "defaults" / "main.yml").write_text("- 1\n")
    with pytest.raises(ValueError, match="wanted a mapping"):
        argspecs.check_role(role)
