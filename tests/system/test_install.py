"""`make install` and `make uninstall` on a fresh Debian (12, or what VLLMD_TEST_SUITE says), without network."""

from __future__ import annotations

import pytest

from tests.system.host import FAKE_ENGINE, Host

pytestmark = pytest.mark.system

COMMANDS = ("vllmd", "vllmctl", "vllm-preflight", "vllm-resolve-model", "vllm-serve")


def test_enable_now_serves_the_demo(host: Host) -> None:
    host.run("systemctl", "enable", "--now", "vllmd@demo", timeout_s=60)
    try:
        assert host.run("systemctl", "is-active", "vllmd@demo").out.strip() == "active"
        assert "demo  ready" in host.run("vllmctl", "status", "demo").out
        assert "vllmd@demo.service" in host.run("systemctl", "list-dependencies", "--plain", "multi-user.target").out
    finally:
        host.run("systemctl", "disable", "--now", "vllmd@demo")


def test_all_commands_are_there_and_say_their_version(host: Host) -> None:
    versions = {host.run(command, "--version").out.split()[-1] for command in COMMANDS}
    assert len(versions) == 1


def test_it_has_what_the_packages_have(host: Host) -> None:
    """Man pages, completions, polkit's rule: all files on its list are there, and for everyone to read."""
    names = host.run("cat", "/usr/local/lib/vllmd/files").out.splitlines()
    files = [name for name in names if not name.endswith("/")]
    assert set(host.run("stat", "-c", "%U %a", *files).out.splitlines()) == {"root 644"}
    assert set(host.run("stat", "-c", "%U %a", *[name for name in names if name.endswith("/")]).out.splitlines()) == {"root 755"}
    assert {"/etc/polkit-1/rules.d/50-vllmd.rules", "/usr/local/share/man/man8/vllmd.8.gz", "/usr/local/share/doc/vllmd/packages.md"} <= set(files)
    assert "-F _vllmctl" in host.shell("bash -c '. /usr/local/share/bash-completion/completions/vllmctl && complete -p vllmctl'").out


def test_what_prometheus_and_grafana_are_pointed_at_names_its_own_place(host: Host) -> None:
    data = "/usr/local/share/vllmd"
    assert f"path: {data}/grafana/dashboards" in host.run("cat", f"{data}/grafana/provisioning/vllmd.yaml").out
    assert host.run("grep", "-rl", "@DATADIR@", data, check=False).out == ""
    assert '"uid": "vllmd"' in host.run("cat", f"{data}/grafana/dashboards/vllmd.json").out
    modes = host.shell(f"stat -c '%U %a' {data} {data}/prometheus {data}/prometheus/alerts.yaml").out.split("\n")
    assert modes[:3] == ["root 755", "root 755", "root 644"]


def test_installing_again_keeps_the_configuration_and_running_instances(host: Host) -> None:
    name = host.instance("stays")
    host.start(name)
    main = host.unit(name).main_pid
    host.shell("echo '# mine' >>/etc/vllmd/demo.yaml")
    before = host.run("readlink", "/usr/local/lib/vllmd/current").out
    host.install(VLLMD_ENGINE_EXECUTABLE=FAKE_ENGINE)
    assert host.run("readlink", "/usr/local/lib/vllmd/current").out != before
    assert host.run("tail", "-n1", "/etc/vllmd/demo.yaml").out == "# mine\n"
    assert host.unit(name).main_pid == main
    host.stop(name)
    assert host.unit(name).status == ("success", 0), "it stops with the modules it was started from"


def test_installation_that_fails_changes_nothing(host: Host) -> None:
    before = host.shell("ls -l /usr/local/lib/vllmd").out
    done = host.install(check=False, PIP_FIND_LINKS="/nowhere")
    assert done.status != 0
    assert "hint: " in done.err
    assert host.shell("ls -l /usr/local/lib/vllmd").out == before
    assert host.run("vllmctl", "--version").status == 0


def test_installation_needs_root(host: Host) -> None:
    done = host.run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/mnt/checkout/tools/install.sh", check=False)
    assert (done.status, done.err.splitlines()[1]) == (77, "  hint: sudo make install")


def test_installation_without_libnuma_or_network_names_the_package_and_changes_nothing(bare: Host) -> None:
    """The CPU build needs it, and a minimal Debian has none: met only when the engine had been downloaded and was started."""
    bare.shell("dpkg --remove --force-depends libnuma1")
    done = bare.install(check=False, VLLMD_INSTALL_ENGINE="yes")
    assert done.status == 1
    assert done.err.splitlines()[-1] == "  hint: sudo apt-get install -y --no-install-recommends libnuma1"
    assert bare.shell("ls /usr/local/bin").out == ""


def test_uninstall_leaves_nothing_but_what_is_the_operator_s(bare: Host) -> None:
    files = "find /usr /etc /var/lib /opt -xdev ! -path '/var/lib/systemd/*' ! -path '*/__pycache__*' | sort"
    before = bare.shell(files).out
    bare.install(VLLMD_ENGINE_EXECUTABLE=FAKE_ENGINE)
    bare.run("systemctl", "enable", "--now", "vllmd@demo")
    assert bare.container.processes("vllmd")
    bare.install("--uninstall")
    assert bare.container.processes("vllmd") == {}
    left = set(bare.shell(files).out.splitlines()) - set(before.splitlines())
    kept = ("/etc/vllmd", "/var/lib/vllmd", "/etc/sub")
    assert [path for path in left if not path.startswith(kept) and not path.endswith("-")] == []
    bare.install(VLLMD_ENGINE_EXECUTABLE=FAKE_ENGINE)
    bare.run("systemctl", "start", "vllmd@demo")
    bare.install("--uninstall", "--purge")
    assert bare.shell("ls -d /etc/vllmd /var/lib/vllmd /usr/local/lib/vllmd", check=False).out == ""
    assert "vllmd" not in bare.run("cat", "/etc/passwd").out


def test_installation_beside_the_package_is_refused(bare: Host) -> None:
    bare.container.write("/root/deb/DEBIAN/control", "Package: vllmd\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n")
    bare.shell("dpkg-deb --build /root/deb /root/vllmd.deb && dpkg -i /root/vllmd.deb")
    done = bare.install(check=False)
    assert done.status == 78
    assert "the Debian package vllmd is installed" in done.err
    assert bare.shell("ls /usr/local/bin").out == ""
    bare.shell("dpkg -r vllmd")
    assert bare.install(check=False, PIP_FIND_LINKS="/nowhere").status != 78, "a removed package is no obstacle"
