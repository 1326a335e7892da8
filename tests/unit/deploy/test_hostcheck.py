from __future__ import annotations

from pdstack.deploy import hostcheck

DF = "Mounted on         Avail\n/            84825444352\n/var/lib/my disk 1048576\n"


def test_enough_is_no_problem() -> None:
    assert hostcheck.problems(DF, 4096, min_disk_mb=1, min_memory_mb=4096, purpose="tests") == []


def test_too_little_says_where_found_and_wanted() -> None:
    disk, memory = hostcheck.problems(DF, 100, min_disk_mb=2000, min_memory_mb=200, purpose="tests")
    assert "found 1 MiB free on the file system /var/lib/my disk, wanted 2000 MiB" in disk
    assert "found 100 MiB, wanted 200 MiB" in memory
