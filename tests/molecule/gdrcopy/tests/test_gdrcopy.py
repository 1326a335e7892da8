from __future__ import annotations

import json

from testinfra.host import Host


def test_the_packages_have_the_version(host: Host) -> None:
    for name in ("gdrdrv-dkms", "libgdrapi", "gdrcopy-tests", "gdrcopy"):
        assert host.package(name).version == "2.5.2-1"


def test_the_device_is_there_and_at_the_next_boot(host: Host) -> None:
    assert host.file("/opt/pdstack-fake/root/dev/gdrdrv").exists
    assert host.file("/etc/modules-load.d/pdstack-gdrcopy.conf").content_string == "gdrdrv\n"


def test_what_it_was_built_against_is_remembered(host: Host) -> None:
    assert json.loads(host.file("/var/lib/pdstack/gdrcopy.json").content_string)["driver"].startswith("open 580.")
