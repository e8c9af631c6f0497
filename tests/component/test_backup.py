"""`vllmctl backup`: what is kept, what comes back, and what is refused, by the command itself on directories of the test's own."""

from __future__ import annotations

import errno
import grp
import io
import json
import os
import pwd
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests import publishing
from tests.component.daemons import quick, stop
from tests.needs import need
from vllmd.config.paths import root_paths
from vllmd.ctl import backup_archive as archive
from vllmd.ctl import backup_places as places
from vllmd.errors import UsageError

pytestmark = pytest.mark.component

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SECRET = "sk-planted-4711-abcdefgh"
CONFIG = {"model": "acme/Tiny", "serve": {"api_key": SECRET, "port": 8123}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with one instance, its drop-in, a key and a generation, and a file of somebody's own."""
    root = tmp_path / "root"
    for name, text in {
        "etc/vllmd.yaml": "log: {level: warning}\n",
        "etc/demo.yaml": json.dumps(CONFIG),
        "etc/demo.d/10-more.yaml": "watch: {hang_timeout_s: 33}\n",
        "etc/.generations/demo/0123abcd/demo.yaml": json.dumps(CONFIG),
        "lib/instances/demo/keys.json": '{"schema": 1, "keys": []}',
        "lib/instances/demo/generations/00001.json": '{"schema": 1}',
        "lib/instances/demo/last.json": "{}",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "etc/demo.yaml").chmod(0o600)
    return root


def run(root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllmd.ctl", "--root", str(root), "backup", *map(str, words)]
    return subprocess.run([sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", *command[3:]], capture_output=True, text=True, timeout=60, check=False)


def created(root: Path, *words: object) -> Path:
    done = run(root, "create", *words)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and "backups" not in path.parts}


def test_what_was_made_comes_back_on_an_empty_host(root: Path, tmp_path: Path) -> None:
    backup = created(root)
    assert backup.parent == root / "backups"
    assert (backup.stat().st_mode & 0o777, backup.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    new = tmp_path / "new"
    done = run(new, "restore", backup)
    assert done.returncode == 0, done.stderr
    wanted = files(root)
    del wanted["lib/instances/demo/last.json"]
    assert files(new) == wanted
    assert (new / "etc/demo.yaml").stat().st_mode & 0o777 == 0o600
    assert (new / "etc/.generations").stat().st_mode & 0o777 == 0o700
    assert "restart NAME, of demo" in done.stderr


def test_any_tar_can_list_it(root: Path) -> None:
    with tarfile.open(created(root)) as tar:
        assert tar.getnames()[0] == "vllmd-backup.json"
        assert "etc/demo.d/10-more.yaml" in tar.getnames()


def test_without_secrets_there_is_none(root: Path, tmp_path: Path) -> None:
    (root / "etc/broken.yaml").write_text(f"serve: {{api_key: {SECRET}, nonsense: 1}}\n")
    done = run(root, "create", "--without-secrets")
    assert "broken.yaml is left out, since its secrets cannot be told" in done.stderr
    backup = Path(done.stdout.strip())
    assert SECRET.encode() not in backup.read_bytes()
    assert b"keys.json" not in backup.read_bytes()
    assert run(tmp_path / "new", "restore", backup).returncode == 0
    text = (tmp_path / "new/etc/demo.yaml").read_text()
    assert yaml.safe_load(text) == {"model": "acme/Tiny", "serve": {"port": 8123}}
    assert text.startswith("# Written by")
    assert sorted(path.name for path in (tmp_path / "new/etc").iterdir()) == ["demo.d", "demo.yaml", "vllmd.yaml"]


def test_without_secrets_there_is_none_in_files_that_no_instance_has(root: Path) -> None:
    (root / "etc/orphan.d").mkdir()
    (root / "etc/orphan.d/1.yaml").write_text(f"engine: {{env: {{X_TOKEN: {SECRET}, NOTE: 'it is {SECRET}', MY_PASSPHRASE: {SECRET}2}}}}\n")
    (root / "etc/orphan.d/2.yaml").write_text(f"serve: {{api_key: {SECRET}\n")
    (root / "etc/orphan.d/3.yaml").write_text(f"engine: {{args: {{otlp-traces-endpoint: 'https://host/x?a=1&token={SECRET[::-1]}&b=2'}}}}\n")
    done = run(root, "create", "--without-secrets")
    assert "2.yaml is left out, since its secrets cannot be told: it is no YAML" in done.stderr
    content = Path(done.stdout.strip()).read_bytes()
    assert (SECRET.encode() in content, SECRET[::-1].encode() in content, b"a=1&token=<redacted>&b=2" in content) == (False, False, True)


def test_tokens_of_others_are_not_in_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = root / "credstore"
    store.mkdir()
    for name in ("vllmd.demo.api-key", "vllmd.hf-token", "vllmd.s3-credentials", "other"):
        (store / name).write_text(SECRET)
    monkeypatch.setattr(places, "CREDENTIALS", {"credstore": store})
    monkeypatch.setattr(places, "DEFAULTS", root / "none/vllmd")
    said: list[str] = []
    found = places.gathered(replace(root_paths(root), scope="system"), secrets=True, say=said.append)
    assert [name for name in found if name.startswith("credstore")] == ["credstore/vllmd.demo.api-key"]
    assert [Path(line.split()[0]).name for line in said] == ["vllmd.hf-token", "vllmd.s3-credentials"]


def test_what_is_there_is_replaced_only_by_force_and_kept(root: Path) -> None:
    backup = created(root)
    (root / "etc/demo.yaml").write_text("model: acme/Other\n")
    (root / "etc/new.yaml").write_text("model: acme/New\n")
    refused = run(root, "restore", backup)
    assert refused.returncode == 64
    assert str(root / "etc/demo.yaml") in refused.stderr
    assert (root / "etc/demo.yaml").read_text() == "model: acme/Other\n"
    done = run(root, "restore", "--force", backup)
    assert done.returncode == 0, done.stderr
    assert json.loads((root / "etc/demo.yaml").read_text()) == CONFIG
    assert (root / "etc/new.yaml").exists()
    before = Path(done.stderr.partition("kept in ")[2].split()[0])
    assert run(root, "restore", "--force", before).returncode == 0
    assert (root / "etc/demo.yaml").read_text() == "model: acme/Other\n"


@pytest.mark.parametrize("at", [600, -3000, -100])
def test_one_flipped_byte_or_a_lost_end_is_refused_and_nothing_written(root: Path, tmp_path: Path, at: int) -> None:
    backup = created(root)
    data = bytearray(backup.read_bytes())
    if at == -100:
        data = data[: len(data) // 2]
    else:
        where = data.index(b"acme/Tiny") if at < 0 else at
        data[where] ^= 1
    backup.write_bytes(data)
    done = run(tmp_path / "new", "restore", backup)
    assert done.returncode == 65, done.stderr
    assert not (tmp_path / "new").exists() or files(tmp_path / "new") == {}
    assert "damaged" in run(root, "list").stdout


@pytest.mark.parametrize("name", ["etc/../../evil", "/etc/passwd", "etc/a/../b", "instances/demo/launch.json", "credstore/other", "etc/" + "a/" * 9 + "b"])
def test_an_archive_of_another_writes_nowhere_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        head = json.dumps({"schema": 1, "files": [{"name": name, "size": 1, "mode": 0o644, "sha256": "0"}]}).encode()
        for each, content in (("vllmd-backup.json", head), (name, b"x")):
            info = tarfile.TarInfo(each)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    done = run(tmp_path / "new", "restore", path)
    assert done.returncode == 65
    assert "no file of a backup" in done.stderr
    assert not (tmp_path / "new").exists()


def test_links_in_the_service_s_directories_are_followed_neither_way(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("ROOT ONLY")
    keys = root / "lib/instances/demo/keys.json"
    backup = created(root)
    keys.unlink()
    keys.symlink_to(secret)
    assert b"ROOT ONLY" not in created(root).read_bytes()
    assert run(root, "restore", "--force", backup).returncode == 0
    assert (secret.read_text(), keys.is_symlink()) == ("ROOT ONLY", False)
    folder = root / "lib/instances/demo"
    (root / "lib/aside").mkdir()
    folder.rename(root / "lib/was")
    folder.symlink_to(root / "lib/aside")
    assert run(root, "restore", "--force", backup).returncode == 74
    assert list((root / "lib/aside").iterdir()) == []


def test_models_come_along_and_back(root: Path, tmp_path: Path) -> None:
    publishing.publish_version(root / "lib/models", 1)
    backup = created(root, "--with-models", "-o", tmp_path / "all.tar")
    new = tmp_path / "new"
    done = run(new, "restore", backup)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(new), "store", "list"], capture_output=True, text=True, check=True)
    assert "acme/Tiny" in listed.stdout
    for path in (tmp_path / "all.tar.models").iterdir():
        path.unlink()
    assert run(tmp_path / "third", "restore", backup).returncode == 64
    assert not (tmp_path / "third").exists()


def test_no_id_of_a_model_ends_a_backup_as_if_it_were_made(root: Path, tmp_path: Path) -> None:
    manifest = publishing.publish_version(root / "lib/models", 1) / ".vllmd-manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace("acme/Tiny", "-h"))
    done = run(root, "create", "--with-models", "-o", tmp_path / "x.tar")
    assert (done.returncode != 0, "usage:" in done.stdout) == (True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]  # also no models without their backup
    manifest.write_text(whole)
    assert "1 models beside it" in run(root, "create", "--with-models", "-o", tmp_path / "x.tar").stderr


def test_a_running_instance_has_its_key_again_after_everything_was_lost() -> None:
    with quick(config={"serve": {"auth": "key"}}) as instance:
        instance.wait_ready()
        keys = instance.state / "keys.json"
        before = keys.read_bytes()
        backup = created(instance.root)
        stop(instance)
        keys.unlink()
        (instance.root / "etc/demo.yaml").unlink()
        assert run(instance.root, "restore", backup).returncode == 0
        assert keys.read_bytes() == before
        instance.start()
        instance.wait_ready()
        assert keys.read_bytes() == before
        stop(instance)


def test_who_may_not_read_is_told_so(root: Path) -> None:
    assert run(root, "restore", root / "absent.tar").returncode == 64
    if os.geteuid() == 0:
        assert run(root, "create", "-o", "/proc/none/x.tar").returncode == 74


def test_who_may_read_a_configuration_may_read_it_again(root: Path, tmp_path: Path) -> None:
    """docs/security.md: a secret in NAME.yaml is for root and the service's group. It came back for root alone, and no instance started."""
    need(os.geteuid() == 0, "root")
    service, other = pwd.getpwnam("nobody"), grp.getgrnam("daemon")
    for each in (root / "lib", root / "lib/instances"):
        os.chown(each, service.pw_uid, service.pw_gid)
    os.chown(root / "etc/demo.yaml", 0, service.pw_gid)
    (root / "etc/demo.yaml").chmod(0o640)
    os.chown(root / "etc/demo.d/10-more.yaml", service.pw_uid, other.gr_gid)
    os.chown(root / "etc/vllmd.yaml", pwd.getpwnam("daemon").pw_uid, 0)
    backup = created(root)
    new = tmp_path / "new"
    (new / "lib").mkdir(parents=True)
    os.chown(new / "lib", service.pw_uid, service.pw_gid)
    before = os.umask(0o077)
    try:
        assert run(new, "restore", backup).returncode == 0
    finally:
        os.umask(before)
    found = {name: ((new / name).stat().st_uid, (new / name).stat().st_gid, (new / name).stat().st_mode & 0o777) for name in ("etc/demo.yaml", "etc/demo.d", "etc/demo.d/10-more.yaml", "etc/vllmd.yaml")}
    assert found == {
        "etc/demo.yaml": (0, service.pw_gid, 0o640),
        "etc/demo.d": (0, 0, 0o755),
        "etc/demo.d/10-more.yaml": (service.pw_uid, other.gr_gid, 0o644),
        "etc/vllmd.yaml": (0, 0, 0o644),  # nobody but root and the service may write there
    }


def test_whatever_the_service_leaves_in_its_state_a_backup_can_be_made_and_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray file ended every backup, and enough of them made one that could not be restored."""
    instances = root / "lib/instances"
    (instances / "stray").write_text("x")
    (instances / "aaa").symlink_to("/etc")
    for name in ("abc", "zzz"):
        (instances / name / "generations").mkdir(parents=True)
        for number in range(300):
            (instances / name / f"generations/{number:05}.json").write_text("x" * 1000)
    monkeypatch.setattr(places, "STATE_FILES", 100)
    said: list[str] = []
    found = places.gathered(root_paths(root), secrets=True, say=said.append)
    assert {"instances/demo/keys.json", "instances/demo/generations/00001.json", "instances/abc/generations/00299.json"} <= set(found)
    assert "instances/abc/generations/00100.json" not in found
    assert [sum(name.startswith("instances/") for name in found), "more than a backup takes" in said[-1]] == [100, True]
    archive.write(tmp_path / "x.tar", archive.Backup("now", "1", True, found))
    assert archive.read(tmp_path / "x.tar").entries == found


def test_the_largest_backup_that_is_made_can_be_read_and_a_larger_one_is_not_made(tmp_path: Path) -> None:
    entries = {f"etc/{'x' * 190}{number:05}.d/{'y' * 190}.yaml": archive.Entry(0o644, b"") for number in range(archive.FILES)}
    backup = archive.Backup("now", "1", True, entries)
    archive.write(tmp_path / "x.tar", backup)
    assert len(archive.read(tmp_path / "x.tar").entries) == archive.FILES
    with pytest.raises(UsageError, match="more than a backup takes"):
        archive.write(tmp_path / "y.tar", replace(backup, entries={**entries, "etc/more.yaml": archive.Entry(0o644, b"")}))
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_disk_without_hard_links_takes_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A USB disk, a share: link(2) is EPERM there."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    backup = archive.Backup("now", "1", True, {"etc/a.yaml": archive.Entry(0o644, b"a")})
    archive.write(tmp_path / "x.tar", backup)
    assert archive.read(tmp_path / "x.tar").entries == backup.entries
    with pytest.raises(UsageError, match="exists already"):
        archive.write(tmp_path / "x.tar", backup)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_configuration_that_is_a_link_is_in_the_backup(root: Path, tmp_path: Path) -> None:
    """A start follows it, and so does what a rollback keeps; of a backup only a note said that it was not in there."""
    (tmp_path / "managed/more.d").mkdir(parents=True)
    (tmp_path / "managed/linked.yaml").write_text("model: acme/Linked\n")
    (tmp_path / "managed/more.d/1.yaml").write_text("log: {level: debug}\n")
    (root / "etc/linked.yaml").symlink_to(tmp_path / "managed/linked.yaml")
    (root / "etc/linked.d").symlink_to(tmp_path / "managed/more.d")
    (root / "etc/loop.d").symlink_to(root / "etc")
    (root / "etc/gone.yaml").symlink_to(tmp_path / "nowhere")
    done = run(root, "create")
    assert "gone.yaml is left out: it leads nowhere" in done.stderr
    assert run(tmp_path / "new", "restore", done.stdout.strip()).returncode == 0
    assert (tmp_path / "new/etc/linked.yaml").read_text() == "model: acme/Linked\n"
    assert (tmp_path / "new/etc/linked.d/1.yaml").is_file()
    (root / "etc/loop.d").unlink()
    (tmp_path / "managed/more.d/1.yaml").write_text("log: {level: warning}\n")
    assert run(root, "restore", done.stdout.strip()).returncode == 64
    assert run(root, "restore", "--force", done.stdout.strip()).returncode == 0
    assert (tmp_path / "managed/more.d/1.yaml").read_text() == "log: {level: debug}\n"


def test_a_host_whose_directories_are_links_is_backed_up_and_restored(root: Path, tmp_path: Path) -> None:
    """/var/lib/vllmd was moved to a larger disk: neither its keys nor its generations were in the backup."""
    for name in ("lib", "etc"):
        (root / name).rename(tmp_path / name)
        (root / name).symlink_to(tmp_path / name)
    backup = created(root)
    assert b"instances/demo/keys.json" in backup.read_bytes()
    (tmp_path / "lib/instances/demo/keys.json").unlink()
    (tmp_path / "etc/demo.yaml").unlink()
    done = run(root, "restore", backup)
    assert (done.returncode, (tmp_path / "lib/instances/demo/keys.json").exists(), (tmp_path / "etc/demo.yaml").exists()) == (0, True, True), done.stderr
