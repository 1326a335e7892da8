from __future__ import annotations

import pytest

from pdstack.deploy import baseimage

DEB822 = """# a comment
Types: deb deb-src
URIs: http://mirror.example.org/debian/
Suites: bookworm bookworm-updates bookworm-backports
Components: main non-free-firmware
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Enabled: no
Types: deb
URIs: http://disabled.example.org/debian
Suites: bookworm
Components: main
"""
ONE_LINE = """deb cdrom:[Debian GNU/Linux 12]/ bookworm main
# deb http://commented.example.org/debian bookworm main
deb-src http://mirror.example.org/debian bookworm main
deb [arch=arm64] http://ports.example.org/debian bookworm main
deb [arch=amd64,i386 signed-by=/etc/apt/keyrings/k.gpg] https://mirror.example.org/debian bookworm main contrib # why
deb http://mirror.example.org/debian bookworm-security main
deb http://vendor.example.org stable main
"""


def plan(files: dict[str, str], suite: str = "bookworm", **options: str) -> baseimage.BasePlan:
    return baseimage.plan(files, suite=suite, architecture="amd64", **options)


def test_deb822() -> None:
    found = plan({"/etc/apt/sources.list.d/debian.sources": DEB822})
    assert found["mirror"] == "http://mirror.example.org/debian"
    assert found["components"] == ["main"]
    assert found["keyring"] == "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert found["keyrings"] == ["/usr/share/keyrings/debian-archive-keyring.gpg"]
    assert not found["trusted"]
    assert found["sources"] == (
        "Types: deb\nURIs: http://mirror.example.org/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\n"
        "Types: deb\nURIs: http://mirror.example.org/debian-security\nSuites: bookworm-security\nComponents: main\n"
    )


def test_one_line_style_skips_other_media_architectures_and_comments() -> None:
    found = plan({"/etc/apt/sources.list": ONE_LINE})
    assert found["mirror"] == "https://mirror.example.org/debian"
    assert found["keyring"] == "/etc/apt/keyrings/k.gpg"
    assert "vendor" not in found["sources"]
    assert "bookworm-security" in found["sources"]
    assert "ports" not in found["sources"]


def test_the_text_for_the_new_system_parses_to_the_same_entries() -> None:
    found = plan({"/etc/apt/sources.list": ONE_LINE})
    again = plan({"/etc/apt/sources.list.d/base.sources": found["sources"]})
    assert again["mirror"] == found["mirror"]
    assert again["sources"] == found["sources"]


def test_ubuntu_takes_universe_along() -> None:
    text = "Types: deb\nURIs: http://mirror.example.org/ubuntu\nSuites: noble\nComponents: main restricted universe\n"
    assert plan({"/etc/apt/sources.list.d/ubuntu.sources": text}, "noble")["components"] == ["main", "universe"]


def test_a_mirror_list_of_a_cloud_image_is_followed() -> None:
    files = {
        "/etc/apt/sources.list.d/debian.sources": (
            "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian.list\nSuites: bookworm\nComponents: main\n"
        ),
        "/etc/apt/mirrors/debian.list": "# nearest\nhttps://near.example.org/debian/\thighest\nhttps://far.example.org/debian\n",
    }
    found = plan(files)
    assert found["mirror"] == "https://near.example.org/debian"
    assert "mirror+file" not in found["sources"]


def test_an_inline_key_is_no_keyring_file() -> None:
    text = (
        "Types: deb\nURIs: http://mirror.example.org/debian\nSuites: bookworm\nComponents: main\nSigned-By:\n"
        " -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n AAAA\n -----END PGP PUBLIC KEY BLOCK-----\n"
    )
    found = plan({"/etc/apt/sources.list.d/x.sources": text})
    assert found["keyring"] == ""
    assert found["keyrings"] == ["-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nAAAA\n-----END PGP PUBLIC KEY BLOCK-----"]


def test_an_unsigned_mirror_is_used_only_where_the_host_trusts_it() -> None:
    assert plan({"/etc/apt/sources.list": "deb [trusted=yes] http://lab.example.org/debian bookworm main\n"})["trusted"]


def test_a_given_mirror_wins_and_needs_no_sources() -> None:
    found = plan({}, mirror="http://other.example.org/debian")
    assert found["mirror"] == "http://other.example.org/debian"
    assert "URIs: http://other.example.org/debian" in found["sources"]


def test_no_entry_for_the_suite_says_what_was_found() -> None:
    with pytest.raises(baseimage.AptSourcesError) as error:
        plan({"/etc/apt/sources.list": "deb http://mirror.example.org/debian trixie main\n"})
    text = str(error.value)
    assert "'bookworm'" in text
    assert "trixie" in text
    assert "images__mirror" in text


def test_the_way_of_apt_is_forwarded() -> None:
    dump = (
        'Acquire "";\nAcquire::http "";\nAcquire::http::Proxy "http://proxy.example.org:3128";\n'
        'Acquire::https::Proxy "DIRECT";\nAcquire::Check-Valid-Until "false";\nDir::Etc "etc/apt";\n'
    )
    assert baseimage.apt_options(dump) == [
        "-o", "Acquire::http::Proxy=http://proxy.example.org:3128",
        "-o", "Acquire::https::Proxy=DIRECT",
        "-o", "Acquire::Check-Valid-Until=false",
    ]  # fmt: skip
    assert baseimage.proxy_environment(dump) == {"http_proxy": "http://proxy.example.org:3128"}
