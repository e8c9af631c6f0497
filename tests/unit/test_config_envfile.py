"""The environment file's grammar: what is written is what is read, and nothing is executed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmd.config import envfile
from vllmd.errors import ConfigError

pytestmark = pytest.mark.unit

MEANINGFUL = "\"'\\/\n\t\r$`#(){} =;n"
NASTY = st.one_of(
    st.text(MEANINGFUL, max_size=12),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
)
KEYS = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,8}\Z")


@given(st.dictionaries(KEYS, NASTY, max_size=6), NASTY)
@settings(max_examples=500)
def test_what_is_written_is_what_is_read(variables: dict[str, str], comment: str) -> None:
    assert envfile.parse(envfile.render(variables, comment), "test") == variables


def test_a_shell_reads_the_same(tmp_path: Path) -> None:
    values = ["plain", "it's", 'say "hi"', "$HOME `id` $(id) ${x}", "back\\slash/\\x", "tab\tcr\rend", "# no comment", "é ü", "it's `id` $(id)"]
    variables = {f"K{i}": value for i, value in enumerate(values)}
    path = tmp_path / "file.env"
    envfile.write(path, variables, "made by a test")
    script = '. "$1"; for i in 0 1 2 3 4 5 6 7 8; do eval "printf \'%s\\0\' \\"\\$K$i\\""; done'
    out = subprocess.run(["sh", "-c", script, "sh", str(path)], capture_output=True, check=True, timeout=30).stdout
    assert out.decode().split("\0")[:-1] == values
    assert envfile.read(path) == variables


def test_written_files_are_private_and_replace_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file.env"
    path.write_text("old")
    path.chmod(0o644)
    envfile.write(path, {"A": "1"})
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["file.env"]


def test_bytes_that_are_no_utf8_survive(tmp_path: Path) -> None:
    path = tmp_path / "file.env"
    value = b"/models/\xff\xfe".decode("utf-8", "surrogateescape")
    envfile.write(path, {"A": value})
    assert envfile.read(path) == {"A": value}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1", {"A": "1"}),
        ("  export A=1  # c", {"A": "1"}),
        ("# c\n\n \t\nA=\n", {"A": ""}),
        ("A='x y' # c", {"A": "x y"}),
        ("A='$(id) `id` ${x}'", {"A": "$(id) `id` ${x}"}),
        ('A="a\\nb\\tc\\"d\\\\e\\qf"', {"A": 'a\nb\tc"d\\eqf'}),
        ('A="\\$(id) \\`id\\`"', {"A": "$(id) `id`"}),
        ("A=$HOME/x", {"A": "$HOME/x"}),
        ('A="$HOME"', {"A": "$HOME"}),
        ("A=a#b", {"A": "a#b"}),
        ("A=1\r\nB='2'\r\n", {"A": "1", "B": "2"}),
        ("A=1\nA=2", {"A": "2"}),
        ("A=b=c", {"A": "b=c"}),
    ],
)
def test_the_grammar_accepts(text: str, expected: dict[str, str]) -> None:
    assert envfile.parse(text, "f") == expected


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("A=$(id)", "f:1:3"),
        ("A=x`id`", "f:1:4"),
        ('A="a ${HOME}"', "f:1:6"),
        ('A="a $(id)"', "f:1:6"),
        ('X=1\nA="`id`"', "f:2:4"),
        ("A='x", "f:1:3"),
        ('A="x\\', "f:1:3"),
        ("A='x'y", "f:1:6"),
        ("A='x'#y", "f:1:6"),
        ("A=x y", "f:1:4"),
        ("A=x;id", "f:1:4"),
        ("A=x&", "f:1:4"),
        ('A=x"y"', "f:1:4"),
        ("A=x\\ y", "f:1:4"),
        ("A = 1", "f:1:1"),
        ("1A=1", "f:1:1"),
        ("  id", "f:1:3"),
        ("export A", "f:1:1"),
        ("Ä=1", "f:1:1"),
        ("\ufeffA=1", "f:1:1"),
        ("A=1\nB='\0'", "f:2:1"),
    ],
)
def test_hostile_lines_are_refused_with_their_place(text: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        envfile.parse(text, "f")
    assert caught.value.what.startswith(place + ": ")
    assert caught.value.hint


def test_keys_outside_the_allow_list_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_text("LD_PRELOAD=/x.so\n_VLLM_RESOLVED_MODEL=/m\nPATH=/evil\n")
    assert envfile.read(path, allow=lambda key: "VLLM" in key) == {"_VLLM_RESOLVED_MODEL": "/m"}


def test_links_fifos_directories_and_giants_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("A=1")
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "giant").write_bytes(b"#" * (envfile.MAX_BYTES + 1))
    for name in ("link", "fifo", "giant", "."):
        with pytest.raises(ConfigError, match=r"link|regular|larger") as caught:
            envfile.read(tmp_path / name)
        assert caught.value.code == "env_file_invalid"
    with pytest.raises(ConfigError) as caught:
        envfile.read(tmp_path / "none")
    assert caught.value.code == "env_file_missing"


def test_a_trusted_file_may_compute(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_text('echo noise\nexport A="${BASE}/x"\nB=$(echo two)\n_VLLM_RESOLVED_MODEL=/m\n')
    path.chmod(0o600)
    found = envfile.read_trusted(path, environ={"PATH": os.environ["PATH"], "BASE": "/b", "_VLLM_RESOLVED_MODEL": "/m"})
    assert found == {"A": "/b/x", "B": "two", "_VLLM_RESOLVED_MODEL": "/m"}


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_never_sourced(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "e"
    path.write_text(f"touch {tmp_path}/executed\n")
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        envfile.read_trusted(path)
    assert caught.value.code == "env_file_untrusted"
    assert not (tmp_path / "executed").exists()


def test_a_file_of_another_user_is_never_sourced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e"
    path.write_text("A=1\n")
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError) as caught:
        envfile.read_trusted(path)
    assert caught.value.code == "env_file_untrusted"


def test_a_trusted_file_that_fails_or_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envfile, "TRUSTED_TIMEOUT_S", 0.5)
    path = tmp_path / "e"
    for text, reason in (("no-such-command-here || exit 3\n", "no-such-command-here"), ("sleep 60\n", "no end within")):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=reason) as caught:
            envfile.read_trusted(path)
        assert caught.value.code == "env_file_failed"
