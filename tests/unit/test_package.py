"""What the packages are made from: the description, the vendored wheels, completions and man pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.needs import need
from tools.package import complete, layout, man, roff, stage, vendor, wheels
from tools.package.changelog import Changes
from tools.package.commands import Command, NoParserError, commands, parser_of
from tools.package.wheels import CHECKOUT
from vllmd import cli, ctl

pytestmark = pytest.mark.unit

SCRIPTS = sorted((CHECKOUT / "packaging/scripts").glob("*/*"))


def _command(name: str) -> Command:
    return next(command for command in commands() if command.words == (name,))


# -- the description


def test_commands_are_those_of_the_project() -> None:
    assert tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"] == stage.COMMANDS


def test_every_unit_and_every_file_for_the_system_is_in_the_package() -> None:
    mine = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "units").rglob("*") if path.is_file()}
    assert mine <= set(layout.FILES)
    assert all((CHECKOUT / source).exists() for source in layout.FILES)


def test_configuration_is_the_administrator_s() -> None:
    told = yaml.safe_load((CHECKOUT / "packaging/nfpm.yaml").read_text())
    kept = {row["dst"] for row in told["contents"] if row.get("type") == "config|noreplace"}
    assert kept == {"/etc/vllmd/vllmd.yaml", "/etc/default/vllmd"}


def test_an_rpm_owns_no_directory_of_others_and_lists_its_documents(tmp_path: Path) -> None:
    program = ("root/usr/bin/vllmd", "root/usr/lib/vllmd/1/a.py", "root/usr/share/zsh/vendor-completions/_vllmd")
    for path in (*program, "documents/doc/README.md", "documents/examples/demo.yaml", "documents/man/man1/x.1.gz"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    rows = {str(row["dst"]): row.get("type", "file") for row in stage.rows(tmp_path, "rpm")}
    doc = "/usr/share/doc/vllmd"
    assert {path for path, kind in rows.items() if kind == "dir"} == {"/usr/lib/vllmd", "/usr/lib/vllmd/1", doc, f"{doc}/examples"}
    assert {path for path, kind in rows.items() if kind == "doc"} == {f"{doc}/README.md", f"{doc}/examples/demo.yaml", "/usr/share/man/man1/x.1.gz"}
    assert "/usr/share/zsh/site-functions/_vllmd" in rows
    assert "doc" not in {row.get("type") for row in stage.rows(tmp_path, "deb")}, "nfpm would leave them out"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_scripts_of_the_packages_are_sound(script: Path, tmp_path: Path) -> None:
    whole = tmp_path / "script"
    whole.write_text((CHECKOUT / "packaging/scripts/functions.sh").read_text() + script.read_text())
    assert subprocess.run(["sh", "-n", whole], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--exclude=SC2317,SC2329", whole], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


# -- vendored wheels


def _wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_of_botocore_only_what_an_s3_client_asks_for_is_kept() -> None:
    assert vendor.is_pruned("botocore/data/ec2/2016-11-15/service-2.json.gz")
    assert vendor.is_pruned("botocore/data/ec2/2016-11-15/partitions.json")
    for kept in ("botocore/data/endpoints.json", "botocore/data/s3/2006-03-01/service-2.json.gz", "botocore/data/sso-oidc/2019-06-10/service-2.json.gz", "botocore/cacert.pem"):
        assert not vendor.is_pruned(kept)


def test_wheels_that_differ_in_a_file_do_not_fit_together(tmp_path: Path) -> None:
    one, two = (_wheel(tmp_path / f"{name}.whl", {"a/b.py": name, "a-1.dist-info/WHEEL": name}) for name in ("one", "two"))
    with pytest.raises(vendor.VendorError, match=r"a/b\.py differs"):
        vendor.unpack([one, two], tmp_path / "site")


def test_wheel_that_leads_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(vendor.VendorError, match="leads outside"):
        vendor.unpack([_wheel(tmp_path / "bad.whl", {"../../evil.py": ""})], tmp_path / "site")


def test_compiled_module_must_be_there_for_each_python(tmp_path: Path) -> None:
    for name in ("x.cpython-311-x86_64-linux-gnu.so", "x.cpython-313-x86_64-linux-gnu.so", "y.abi3.so"):
        (tmp_path / name).touch()
    vendor.check_extensions(tmp_path, ("3.11", "3.13"))
    with pytest.raises(vendor.VendorError, match="x: built for 311, 313, wanted 311, 312, 313"):
        vendor.check_extensions(tmp_path, ("3.11", "3.12", "3.13"))


def test_lock_names_everything_that_the_project_requires_with_hashes() -> None:
    locked = re.findall(r"(?m)^([\w.-]+)==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", wheels.LOCK.read_text())
    wanted = {re.split(r"[^\w.-]", each)[0].lower().replace("_", "-") for each in wheels.requirements()}
    assert wanted <= set(locked)


# -- completions


def test_every_verb_that_another_module_parses_is_found() -> None:
    paths = {each.words for command in commands() for each in command.walk()}
    assert {("vllmctl", "engine", "install"), ("vllmctl", "store", "gc"), ("vllmd", "run")} <= paths
    assert parser_of(ctl.run, ["store"]).prog == "vllmctl store"
    assert parser_of(cli._run, []).prog == "vllmd"


def test_verb_that_nothing_parses_is_an_error() -> None:
    with pytest.raises(NoParserError):
        parser_of(lambda words: 0, ["nothing"])


def _completed(words: str) -> list[str]:
    """What bash offers for the last word."""
    need(shutil.which("bash") is not None, "bash")
    script = complete.bash(_command("vllmctl")) + f"COMP_WORDS=({words} ''); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _vllmctl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_verbs_of_verbs() -> None:
    assert {"start", "status", "store"} <= set(_completed("vllmctl"))
    assert _completed("vllmctl store") == [verb.words[-1] for each in _command("vllmctl").verbs if each.words[-1] == "store" for verb in each.verbs]


@pytest.mark.parametrize(("shell", "make"), [("bash", complete.bash), ("zsh", complete.zsh), ("fish", complete.fish)])
def test_completions_are_sound(shell: str, make: object, tmp_path: Path) -> None:
    need(shutil.which(shell) is not None, shell)
    for command in commands():
        script = tmp_path / command.words[0]
        script.write_text(make(command))  # type: ignore[operator]
        done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_fish_completes_verbs_of_verbs(tmp_path: Path) -> None:
    need(shutil.which("fish") is not None, "fish")
    script = tmp_path / "vllmctl.fish"
    script.write_text(complete.fish(_command("vllmctl")))
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(["fish", "-c", f"source {script}; complete -C 'vllmctl store '"], capture_output=True, text=True, check=True, env=home, timeout=60)
    assert {"gc", "verify"} <= {line.split("\t")[0] for line in done.stdout.splitlines()}


# -- man pages


def test_every_command_has_a_page_which_names_all_its_flags() -> None:
    assert set(man.SUMMARIES) == set(stage.COMMANDS)
    for command in commands():
        page = man.page(command, "2026-01-01").replace("\\-", "-")
        for each in command.walk():
            for option in each.options:
                assert option.flags[-1] in page


def test_page_of_the_daemon_has_the_exit_statuses() -> None:
    page = man.page(_command("vllmd"), "2026-01-01")
    assert ".SH EXIT STATUS" in page
    assert "TEMPFAIL" in page


def test_what_looks_like_a_request_of_roff_is_text() -> None:
    assert roff.markdown(".so /etc/passwd\n") == ".PP\n\\&.so /etc/passwd\n"
    assert roff.markdown("'\\fB x\n") == ".PP\n\\&\\(aq\\efB x\n"


SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "VERBS", "EXIT STATUS", "ENVIRONMENT", "FILES", "SIGNALS", "NOTES", "EXAMPLES", "SEE ALSO"]
PAGES = dict(man.pages("2026-01-01"))
COLUMNS = 80
BEFORE_CODE = 11
"""Columns of margin that man and the page put before a line of code."""


def test_pages_of_commands_have_what_a_man_page_has() -> None:
    for file in ("vllmd.8", "vllmctl.1"):
        found = re.findall(r"(?m)^\.SH (.*)$", PAGES[file])
        assert found == [section for section in SECTIONS if section != "SIGNALS" or file == "vllmd.8"]


@pytest.mark.parametrize("file", PAGES)
def test_page_fits_a_terminal(file: str) -> None:
    """Text is broken by whatever shows it; code is not."""
    assert re.match(r"\.\\\" Made by .*\n\.TH \S+ [1-8] ", PAGES[file])
    for block in re.findall(r"(?s)\n\.nf\n(.*?)\.fi\n", PAGES[file]):
        for line in block.replace("\\-", "-").splitlines():
            plain = re.sub(r"\\\(..", "x", line.removeprefix("\\&")).replace("\\e", "x")
            assert len(plain) <= COLUMNS - BEFORE_CODE, plain


@pytest.mark.parametrize("file", PAGES)
def test_page_is_sound_for_groff(file: str) -> None:
    need(shutil.which("groff") is not None, "groff")
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=78n"], input=PAGES[file], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if len(line) > COLUMNS] == []
    assert done.stdout.splitlines()[0].split()[0] == f"{file.rpartition('.')[0]}({file[-1]})".upper()


def test_pages_name_each_other() -> None:
    names = {f"{file.rpartition('.')[0]}({file[-1]})" for file in PAGES}
    ours = {name for name in man.SEE_ALSO if name.startswith("vllm")}
    assert ours <= names
    for file, text in PAGES.items():
        told = set(re.findall(r"\bvllm[a-z.-]*\([1-8]\)", text.replace("\\-", "-")))
        assert told <= names, file
        assert ours - {f"{file.rpartition('.')[0]}({file[-1]})"} <= told, file


# -- the changelog


def test_version_that_news_does_not_know_comes_first() -> None:
    changes = Changes("# News\n\n## 1.0 (2026-02-03)\n\n- One `thing`,\n  in two lines.\n", "1.1", "1", 0, "me <me@example.org>")
    assert [version for version, _, _ in changes.entries()] == ["1.1", "1.0"]
    assert "  * One thing, in two lines.\n\n -- me <me@example.org>  Tue, 03 Feb 2026 00:00:00 +0000" in changes.for_debian()
