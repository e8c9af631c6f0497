"""The packages on a fresh Debian (12, or what VLLMD_TEST_SUITE says), without network, with instances that run.

The tests stand in the order of a package's life, and build upon each other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import need
from tests.system.conftest import EPOCH
from tests.system.container import Container, wait_for
from tests.system.extras import extra_packages
from tests.system.host import FAKE_ENGINE, MODEL, Host
from tests.system.tree import CHECKOUT, SUITES, debian_tree, suite
from tools.package.__main__ import Build, build

pytestmark = pytest.mark.system

OLD, NEW = "0.1.0-1", "0.1.1-1"
LIB = "/usr/lib/vllmd"
COMMANDS = ("vllmd", "vllmctl", "vllm-preflight", "vllm-resolve-model", "vllm-serve")
STREAM = """
import json, sys, urllib.request as r
body = {"model": sys.argv[2], "prompt": "x", "max_tokens": 120, "stream": True, "ignore_eos": True}
key = json.load(open(f"/var/lib/vllmd/public/{sys.argv[2]}/credentials.json"))["apiKey"]
ask = r.Request(f"http://127.0.0.1:{sys.argv[1]}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
with r.urlopen(ask, timeout=60) as answer, open(sys.argv[3], "w", buffering=1) as out:
    for line in answer:
        out.write(line.decode())
"""
ELSEWHERE = (
    *("click._winconsole", "dateutil.tz.win", "dateutil.tzwin", "rich._win32_console", "rich._windows_renderer", "truststore._macos", "truststore._windows"),
    *("botocore.crt", "tqdm._utils", "tqdm.contrib.slack"),
)
"""Modules of other systems, and those that say in words of their own which distribution they lack."""
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
site = next(p for p in sys.path if p.endswith("site-packages"))
elsewhere = set(sys.argv[1:])
bad = []
for module in sorted(pkgutil.iter_modules([site])):
    names = [module.name]
    package = importlib.import_module(module.name)
    assert package.__file__.startswith(site), package.__file__
    if module.ispkg:
        names += [each.name for each in pkgutil.walk_packages(package.__path__, module.name + ".", onerror=lambda name: None)]
    for name in names:
        if name.endswith(".__main__") or any(name == each or name.startswith(each + ".") for each in elsewhere):
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # What a distribution can use beside its own requirements, and does without.
            if importlib.util.find_spec(error.name.partition(".")[0]) or error.name.startswith("vllmd"):
                bad.append(f"{name}: {error!r}")
        except Exception as error:
            bad.append(f"{name}: {error!r}")
print(len(sys.modules))
sys.exit("\\n".join(bad) or 0)
"""


@pytest.fixture(scope="module")
def machine(binds: dict[str, Path], packages: Path) -> Iterator[Host]:
    """A container of its own: that of the other tests has the program already."""
    with Container(debian_tree(), binds | {"/mnt/packages": packages, "/mnt/extras": extra_packages()}) as container:
        yield Host(container)


@pytest.fixture(scope="module")
def rpm_machine(binds: dict[str, Path], packages: Path) -> Iterator[Host]:
    with Container(debian_tree(), binds | {"/mnt/packages": packages, "/mnt/extras": extra_packages()}) as container:
        yield Host(container)


def _apt(host: Host, *words: str) -> str:
    done = host.run("apt-get", "-qq", "-y", "-o", "Dpkg::Use-Pty=0", *words, env={"DEBIAN_FRONTEND": "noninteractive"}, timeout_s=120)
    return done.out + done.err


def _deb(version: str) -> str:
    return f"/mnt/packages/vllmd_{version}_amd64.deb"


def _demo_model(host: Host) -> None:
    program = host.shell(f"ls -d {LIB}/[0-9]*").out.split()[-1]
    host.run("runuser", "-u", "vllmd", "--", f"{program}/bin/python3", "-I", "-m", "vllmd.models.demo", MODEL)


def _start_life(host: Host) -> None:
    """With what is known of an installed vLLM: only then does a stop let requests finish."""
    host.container.write("/srv/fake/bin/vllm", f'#!/bin/sh\nexec {FAKE_ENGINE} "$@"\n', 0o755)
    host.container.write("/srv/fake/vllmd-engine.json", json.dumps({"schema": 1, "version": "0.32.0", "variant": "cpu", "flags": ["--shutdown-timeout"]}))
    name = host.instance("life", env={"FAKE_TOKEN_S": "0.05"}, engine={"executable": "/srv/fake/bin/vllm"}, serve={"served_model_name": "life"})
    host.start(name)


def _programs(host: Host) -> set[str]:
    return set(host.shell(f"ls -A {LIB}").out.split())


def _runs(host: Host, name: str) -> str:
    """The version that an instance's supervisor was started from."""
    line = host.container.path(f"/proc/{host.unit(name).main_pid}/cmdline").read_bytes().decode()
    return line.removeprefix(f"{LIB}/").partition("/")[0]


def _begin_stream(host: Host, name: str, log: str) -> None:
    host.container.write("/root/stream.py", STREAM)
    host.run("systemd-run", "--quiet", f"--unit={Path(log).stem}", "python3", "/root/stream.py", str(host.port(name)), name, log)
    wait_for(lambda: "data:" in host.run("cat", log, check=False).out, 20, "the stream's first token")


def _end_stream(host: Host, log: str) -> str:
    wait_for(lambda: host.run("systemctl", "is-active", "--quiet", Path(log).stem, check=False).status != 0, 60, "the end of the stream")
    return host.run("cat", log).out


# -- the files


def test_two_builds_are_the_same_bytes(packages: Path, tmp_path: Path) -> None:
    again = build(Build("amd64", ("deb", "rpm"), "0.1.0", tmp_path, EPOCH))
    for path in again:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256((packages / path.name).read_bytes()).hexdigest()


def test_packages_are_small(packages: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in packages.iterdir()}
    assert len(sizes) == 4
    assert max(sizes.values()) <= 20e6, sizes


# -- the .deb, from installation to purge


def test_installation_without_network_makes_a_host_that_serves(machine: Host) -> None:
    machine.run("python3", "-c", "", timeout_s=20)
    before = set(machine.shell("find /etc /usr /var/lib /var/cache /opt -xdev | sort").out.splitlines())
    machine.container.write("/root/before.json", json.dumps(sorted(before)))
    _apt(machine, "install", _deb(OLD))
    versions = {machine.run(command, "--version").out.split()[-1] for command in COMMANDS}
    assert len(versions) == 1
    assert _programs(machine) == {OLD}
    assert machine.run("systemctl", "is-enabled", "vllmd.target", "vllmd-gpu.service").out.split() == ["enabled", "enabled"]
    assert machine.run("systemctl", "is-active", "vllmd.target").out.strip() == "active"
    assert "vllmd" in machine.run("journalctl", "--list-catalog").out
    assert "vllmd-admin" in machine.run("id", "vllmd").out
    assert machine.run("dpkg", "-V", "vllmd").out == ""
    _demo_model(machine)
    _start_life(machine)
    assert machine.health("life") == 200
    assert _runs(machine, "life") == OLD


def test_every_vendored_module_imports_with_the_distribution_s_python(machine: Host) -> None:
    done = machine.run(f"{LIB}/{OLD}/bin/python3", "-I", "-c", IMPORT_ALL, *ELSEWHERE, timeout_s=120)
    assert int(done.out.split()[-1]) > 500


@pytest.mark.parametrize("release", [each for each in SUITES if each != suite()])
def test_every_vendored_module_imports_on_the_other_debian(release: str, packages: Path) -> None:
    with Container(debian_tree(release), {"/mnt/packages": packages}) as container:
        _apt(Host(container), "install", _deb(OLD))
        done = container.run(f"{LIB}/{OLD}/bin/python3", "-I", "-c", IMPORT_ALL, *ELSEWHERE, timeout_s=120)
        assert int(done.out.split()[-1]) > 500


def test_modules_are_byte_compiled_and_come_from_nowhere_else(machine: Host) -> None:
    cached = machine.shell(f"find {LIB}/{OLD} -name '*.pyc' | wc -l; find {LIB}/{OLD}/lib/python3/site-packages -name '*.py' | wc -l").out.split()
    assert cached[0] == cached[1]
    path = machine.run(f"{LIB}/{OLD}/bin/python3", "-I", "-c", "import sys; print(*sys.path)").out
    assert "dist-packages" not in path


def test_commands_in_a_hostile_directory_and_environment_import_nothing_of_it(machine: Host) -> None:
    machine.shell("mkdir -p /tmp/trap && echo 'raise SystemExit(99)' | tee /tmp/trap/argparse.py /tmp/trap/yaml.py /tmp/trap/vllmd.py >/tmp/trap/re.py")
    done = machine.run("sh", "-c", "cd /tmp/trap && vllmctl status", env={"PYTHONPATH": "/tmp/trap", "PYTHONHOME": "/tmp/trap"}, check=False)
    assert done.status in (0, 3), done.err


def test_upgrade_lets_an_instance_run_on_with_its_own_program(machine: Host) -> None:
    """RESTART_ON_UPGRADE=no is how it is shipped: a stream ends as if nothing had happened, and so does the instance."""
    machine.shell("echo '# mine' >>/etc/vllmd/vllmd.yaml")
    main = machine.unit("life").main_pid
    _begin_stream(machine, "life", "/root/first.log")
    said = _apt(machine, "install", _deb(NEW))
    assert "vllmd: vllmd@life.service: still the version before" in said
    assert _end_stream(machine, "/root/first.log").rstrip().endswith("data: [DONE]")
    assert (machine.unit("life").main_pid, _runs(machine, "life")) == (main, OLD)
    assert _programs(machine) == {OLD, NEW}, "it may still have modules to import"
    assert machine.run("tail", "-n1", "/etc/vllmd/vllmd.yaml").out == "# mine\n"
    assert machine.run("dpkg", "-V", "vllmd").out.split()[-1:] == ["/etc/vllmd/vllmd.yaml"]
    machine.stop("life")
    assert machine.unit("life").status == ("success", 0)
    machine.start("life")
    assert _runs(machine, "life") == NEW


def test_downgrade_restarts_an_instance_where_the_admin_wants_it(machine: Host) -> None:
    machine.shell("sed -i s/^RESTART_ON_UPGRADE=.*/RESTART_ON_UPGRADE=yes/ /etc/default/vllmd")
    main = machine.unit("life").main_pid
    _begin_stream(machine, "life", "/root/second.log")
    _apt(machine, "install", "--allow-downgrades", _deb(OLD))
    assert _end_stream(machine, "/root/second.log").rstrip().endswith("data: [DONE]"), "a stop lets requests in flight finish"
    wait_for(lambda: machine.unit("life").main_pid not in (0, main) and machine.unit("life")["ActiveState"] == "active", 60, "the restart")
    assert (_runs(machine, "life"), machine.health("life")) == (OLD, 200)
    assert machine.state("life")["state"] == "ready"


def test_reinstallation_under_an_instance_keeps_it_and_forgets_old_programs(machine: Host) -> None:
    machine.shell("sed -i s/^RESTART_ON_UPGRADE=.*/RESTART_ON_UPGRADE=no/ /etc/default/vllmd")
    main = machine.unit("life").main_pid
    _apt(machine, "install", "--reinstall", _deb(OLD))
    assert _programs(machine) == {OLD}
    assert (machine.unit("life").main_pid, machine.health("life")) == (main, 200)


def test_removal_stops_instances_and_keeps_what_is_the_operator_s(machine: Host) -> None:
    machine.run("systemctl", "enable", "vllmd@life")
    _apt(machine, "remove", "vllmd")
    assert machine.container.processes("vllmd") == {}
    assert machine.shell(f"ls -d {LIB} /usr/bin/vllm*", check=False).out == ""
    assert machine.shell("ls /etc/vllmd").out.split() == ["life.yaml", "vllmd.yaml"]
    assert machine.run("systemctl", "is-active", "vllmd@life", check=False).out.strip() == "inactive"


def test_installation_after_a_removal_starts_what_is_enabled(machine: Host) -> None:
    _apt(machine, "install", _deb(NEW))
    machine.wait_unit("life", 60, ActiveState="active")
    assert (_runs(machine, "life"), machine.health("life")) == (NEW, 200)


def test_polkit_lets_the_group_start_and_stop_instances_and_nothing_else(machine: Host) -> None:
    """The service's own account is in that group: an engine that was broken into must not command systemd."""
    machine.shell("dpkg -i /mnt/extras/*.deb >/root/extras.log 2>&1 || cat /root/extras.log", timeout_s=200)
    machine.shell("useradd --groups vllmd-admin ada && useradd bob && systemctl restart polkit && systemctl daemon-reexec")

    def tries(user: str, *words: str) -> bool:
        return machine.run("runuser", "-u", user, "--", "systemctl", "--no-ask-password", *words, check=False, timeout_s=60).status == 0

    assert tries("ada", "restart", "vllmd@life")
    assert tries("ada", "stop", "vllmd@life")
    assert tries("ada", "start", "vllmd@life")
    assert not tries("ada", "stop", "dbus.service")
    assert not tries("ada", "stop", "vllmd-gpu.service")
    assert not tries("ada", "enable", "vllmd@life")
    assert not tries("bob", "stop", "vllmd@life")
    assert not tries("vllmd", "stop", "vllmd@life")
    assert machine.health("life") == 200


def test_purge_leaves_only_models(machine: Host) -> None:
    machine.shell("mkdir -p /var/lib/vllmd/backups && touch /var/lib/vllmd/backups/monday.tar")
    said = _apt(machine, "purge", "vllmd")
    assert machine.container.processes("vllmd") == {}
    assert "kept: /var/lib/vllmd/models" in said
    left = machine.shell("find / -xdev -iname '*vllmd*' ! -path '/proc/*' ! -path '/sys/*' ! -path '/mnt/*' ! -path '/root/*' ! -path '/tmp/*' ! -path '/srv/*' ! -path '/var/log/*' ! -path '/run/*' ! -path '/var/lib/polkit*'").out
    assert [path for path in left.split() if not path.startswith("/var/lib/vllmd/models/")] == ["/var/lib/vllmd"]
    assert machine.shell("ls /var/lib/vllmd").out.split() == ["backups", "models"]
    assert machine.run("systemctl", "list-unit-files", "vllmd*", check=False).out.count("vllmd") == 0


def test_installation_after_a_purge_is_a_first_one(machine: Host) -> None:
    _apt(machine, "install", _deb(OLD))
    machine.start(machine.instance("again"))
    assert machine.health("again") == 200
    assert "# mine" not in machine.run("cat", "/etc/vllmd/vllmd.yaml").out
    machine.stop("again")


# -- the .rpm


def _rpm(host: Host, *words: str) -> str:
    # The tree is Debian's: its rpm database knows no python3. Scripts, files and systemd are real.
    insist = ("--force-debian",) if suite() == "bookworm" else ()  # of Debian's rpm alone, and of Debian 12's last
    done = host.run("rpm", *insist, "--nodeps", *words, timeout_s=120)
    return done.out + done.err


def test_the_rpm_installs_upgrades_and_leaves(rpm_machine: Host, packages: Path) -> None:
    host = rpm_machine
    host.shell("dpkg -i /mnt/extras/*.deb >/root/extras.log 2>&1 || cat /root/extras.log", timeout_s=200)
    old, new = (f"/mnt/packages/vllmd-{version}.x86_64.rpm" for version in (OLD, NEW))
    _rpm(host, "-i", old)
    assert host.run("systemctl", "is-enabled", "vllmd.target").out.strip() == "enabled"
    assert {line.split()[-1] for line in host.run("rpm", "-q", "--configfiles", "vllmd").out.splitlines()} == {"/etc/default/vllmd", "/etc/vllmd/vllmd.yaml"}
    _demo_model(host)
    _start_life(host)
    main = host.unit("life").main_pid
    _begin_stream(host, "life", "/root/first.log")
    said = _rpm(host, "-U", new)
    assert "still the version before" in said
    assert _end_stream(host, "/root/first.log").rstrip().endswith("data: [DONE]")
    assert (host.unit("life").main_pid, _programs(host)) == (main, {OLD, NEW})
    assert host.shell(f"ls {LIB}/{NEW}/lib/python3/site-packages/vllmd/__pycache__ | wc -l").out.strip() != "0"
    host.shell("sed -i s/^RESTART_ON_UPGRADE=.*/RESTART_ON_UPGRADE=yes/ /etc/default/vllmd")
    _rpm(host, "-U", "--oldpackage", old)
    wait_for(lambda: host.unit("life").main_pid not in (0, main) and host.unit("life")["ActiveState"] == "active", 60, "the restart")
    assert (_runs(host, "life"), host.health("life")) == (OLD, 200)
    _rpm(host, "-e", "vllmd")
    assert host.container.processes("vllmd") == {}
    assert host.shell(f"ls -d {LIB} /usr/bin/vllm* /usr/share/doc/vllmd", check=False).out == ""
    assert "life.yaml" in host.shell("ls /etc/vllmd").out


def test_neither_lintian_nor_rpmlint_has_a_word_to_say(packages: Path) -> None:
    for tool in ("lintian", "rpmlint"):
        need(shutil.which(tool) is not None, tool)
    deb = subprocess.run(["lintian", "--allow-root", "--fail-on=warning", packages / f"vllmd_{OLD}_amd64.deb"], capture_output=True, text=True, check=False, timeout=300)
    assert (deb.returncode, deb.stdout) == (0, ""), deb.stdout + deb.stderr
    config = CHECKOUT / "packaging/rpmlint.toml"
    rpm = subprocess.run(["rpmlint", "-c", config, packages / f"vllmd-{OLD}.x86_64.rpm"], capture_output=True, text=True, check=False, timeout=300)
    assert "0 errors, 0 warnings" in rpm.stdout, rpm.stdout
