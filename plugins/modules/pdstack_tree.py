#!/usr/bin/python
"""Keep a directory holding exactly the given files. Runs on the managed host, with the standard library only."""

from __future__ import annotations

import difflib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: pdstack_tree
short_description: Keeps a directory holding exactly the given files
description:
  - Writes the files, removes every other file and directory below O(path), and sets owner, group and modes.
  - One call for a whole tree, so that a service's configuration costs one round trip and not one a file.
options:
  path: {description: The directory., type: path, required: true}
  state: {description: Whether the tree is there at all., type: str, choices: [present, absent], default: present}
  owner: {description: Numeric user id of everything in the tree., type: int, required: true}
  group: {description: Numeric group id of everything in the tree., type: int, required: true}
  directory_mode: {description: Mode of the directories., type: str, default: "0750"}
  files:
    description: What the tree holds.
    type: list
    elements: dict
    default: []
    suboptions: &file
      path: {description: Relative to the directory., type: str, required: true}
      content: {description: The text., type: str, required: true}
      mode: {description: Octal., type: str, required: true}
  secrets:
    description: As O(files), for contents that are never shown.
    type: list
    elements: dict
    default: []
    suboptions: *file
  directories:
    description: Other directories to create with this owner, outside the tree; nothing is removed from them.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute., type: path, required: true}
      mode: {description: Octal., type: str, required: true}
author: [pdstack]
"""

EXAMPLES = r"""
- name: Write the configuration of a service
  pdstack_tree:
    path: /etc/pdstack/local/etcd
    owner: 64000
    group: 64000
    files:
      - {path: etcd.json, content: "{}", mode: "0440"}
"""

RETURN = r"""
changes:
  description: What was (or, in check mode, would be) done, one sentence an item.
  type: list
  elements: str
  returned: always
"""


class Tree:
    """The wanted state of the directory, compared with the real one; `apply` false only records the differences."""

    def __init__(self, *, owner: int, group: int, apply: bool) -> None:
        self.owner, self.group, self.apply = owner, group, apply
        self.changes: list[str] = []
        self.diffs: list[dict[str, str]] = []

    def change(self, sentence: str) -> bool:
        """Record a difference; tells whether to act on it."""
        self.changes.append(sentence)
        return self.apply

    def attributes(self, path: Path, mode: int) -> None:
        """Give an existing path its owner, group and mode."""
        if not path.exists():
            return
        now = path.lstat()
        if (now.st_uid, now.st_gid) != (self.owner, self.group) and self.change(f"owner of {path}"):
            os.chown(path, self.owner, self.group)
        if stat.S_IMODE(now.st_mode) != mode and self.change(f"mode of {path} to {mode:04o}"):
            path.chmod(mode)

    def directory(self, path: Path, mode: int) -> None:
        """Make a directory; parents that are missing belong to root and are passable for everyone."""
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ValueError(f"{path} is there and is no directory; wanted a directory: move it away")
        if not path.exists() and self.change(f"create {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        self.attributes(path, mode)

    def file(self, path: Path, content: str, mode: int, secret: bool) -> None:
        """Write a file by rename, so that a reader sees the old text or the new one."""
        old = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        new = content.encode()
        if old != new:
            hidden = "(content not shown)\n"
            before = "" if old is None else hidden if secret else old.decode(errors="replace")
            after = "(new content not shown)\n" if secret else content
            self.diffs.append({"before_header": str(path), "after_header": str(path), "before": before, "after": after})
            if self.change(f"write {path}"):
                self.remove(path) if path.is_symlink() or path.is_dir() else None
                descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".pdstack-")
                try:
                    with os.fdopen(descriptor, "wb") as handle:
                        handle.write(new)
                    os.chown(name, self.owner, self.group)
                    Path(name).chmod(mode)
                    Path(name).replace(path)
                except BaseException:
                    Path(name).unlink()
                    raise
        self.attributes(path, mode)

    def remove(self, path: Path) -> None:
        """Delete a file, link or directory."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def strangers(self, root: Path, wanted: set[Path]) -> None:
        """Delete what is below `root` and neither wanted nor on the way to something wanted."""
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            if path in wanted and path.is_dir() and not path.is_symlink():
                self.strangers(path, wanted)
            elif path not in wanted and self.change(f"delete {path}"):
                self.remove(path)


def ensure(tree: Tree, params: dict[str, Any]) -> None:
    """Bring the host to what the parameters say."""
    root = Path(params["path"])
    for entry in params["directories"]:
        tree.directory(Path(entry["path"]), int(entry["mode"], 8))
    if params["state"] == "absent":
        if (root.exists() or root.is_symlink()) and tree.change(f"delete {root}"):
            tree.remove(root)
        return
    directory_mode = int(params["directory_mode"], 8)
    files = [(f, False) for f in params["files"]] + [(f, True) for f in params["secrets"]]
    tree.directory(root, directory_mode)
    wanted: set[Path] = set()
    for file, _ in files:
        path = root / file["path"]
        parents = [parent for parent in reversed(path.parents) if parent.is_relative_to(root) and parent != root]
        for parent in parents:
            if parent not in wanted:
                tree.directory(parent, directory_mode)
        wanted |= {path, *parents}
    tree.strangers(root, wanted)
    for file, secret in files:
        tree.file(root / file["path"], file["content"], int(file["mode"], 8), secret)


def unified(diffs: list[dict[str, str]]) -> str:
    """Return the differences as one text, the way `diff -u` writes it."""
    parts: list[str] = []
    for item in diffs:
        parts += difflib.unified_diff(
            item["before"].splitlines(True), item["after"].splitlines(True), item["before_header"], item["after_header"]
        )
    return "".join(parts)


def main() -> None:
    file_options = {
        "path": {"type": "str", "required": True},
        "content": {"type": "str", "required": True},
        "mode": {"type": "str", "required": True},
    }
    secret_options = file_options | {"content": {"type": "str", "required": True, "no_log": True}}
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "owner": {"type": "int", "required": True},
            "group": {"type": "int", "required": True},
            "directory_mode": {"type": "str", "default": "0750"},
            "files": {"type": "list", "elements": "dict", "default": [], "options": file_options},
            "secrets": {
                "type": "list", "elements": "dict", "default": [], "no_log": False, "options": secret_options,
            },
            "directories": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": {"type": "path", "required": True}, "mode": {"type": "str", "required": True}},
            },
        },
        supports_check_mode=True,
    )  # fmt: skip
    tree = Tree(owner=module.params["owner"], group=module.params["group"], apply=not module.check_mode)
    try:
        ensure(tree, module.params)
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"cannot keep {module.params['path']} as wanted: {error}", changes=tree.changes)
    module.exit_json(changed=bool(tree.changes), changes=tree.changes, diff={"prepared": unified(tree.diffs)})


if __name__ == "__main__":
    main()
