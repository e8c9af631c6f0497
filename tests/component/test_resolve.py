"""Where a model is found, in which order, and what is said when it is not: real directories, links and locks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.needs import need
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.errors import ModelInvalid, ModelNotFound, PermissionMissing, StorageFailed, VllmdError
from vllmd.models import demo, sources
from vllmd.models.identity import hash12, label
from vllmd.models.progress import Progress
from vllmd.models.resolve import resolve, resolve_report, verified
from vllmd.models.sources import hf_cache, hub

pytestmark = pytest.mark.component

SHARD2 = "model-00002-of-00002.safetensors"


class Told:
    """Collects what a person is told."""

    def __init__(self) -> None:
        self.events: list[Progress] = []

    def __call__(self, event: Progress) -> None:
        self.events.append(event)

    @property
    def text(self) -> str:
        return "\n".join(event.text for event in self.events)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def find(store: Path, told: Told) -> Callable[..., ResolvedModel]:
    """Resolve acme/Tiny; keywords of the request, `settings` and `environ` may be given."""

    def run(settings: Model | None = None, environ: dict[str, str] | None = None, **asked: object) -> ResolvedModel:
        request = tiny_models.request(store, **asked)  # type: ignore[arg-type]
        return resolve(request, settings or tiny_models.settings(), environ or {}, told)

    return run


Find = Callable[..., ResolvedModel]


def publish(store: Path, asked: ModelRequest, name: str = "") -> Path:
    """A published version as the store has it; `name` is the link's."""
    version = store / ".published" / label(asked) / ("ab" * 32)
    demo.make(version)
    (store / (name or label(asked))).symlink_to(version.relative_to(store))
    return version


def test_users_own_directory_is_used_in_place_and_untouched(store: Path, find: Find, told: Told) -> None:
    directory = demo.make(store / "Tiny")
    before = tiny_models.tree(directory)
    model = find()
    assert (model.directory, model.via, model.identity) == (directory, "local", "acme/Tiny")
    assert model.bytes == sum(path.stat().st_size for path in directory.iterdir())
    assert tiny_models.tree(directory) == before
    assert "Checking bundled models... skipped (FLOX_ENV not set)" in told.text
    assert "Checking local directory... OK" in told.text
    assert told.text.endswith("Resolved: acme/Tiny (via local)")


def test_first_hit_wins_and_later_sources_are_not_asked(store: Path, find: Find, told: Told) -> None:
    demo.make(store / "Tiny")
    tiny_models.snapshot(store / "hub", "acme/Tiny", "c1", main=True)
    assert find().via == "local"
    assert "hub caches" not in told.text
    assert find(sources=("hf-cache", "local")).via == "hf-cache"


def test_link_to_a_users_own_directory_gives_the_real_path(store: Path, tmp_path: Path, find: Find) -> None:
    directory = demo.make(tmp_path / "elsewhere")
    (store / "Tiny").symlink_to(directory)
    assert find().directory == directory


def test_published_link_gives_the_version_it_leads_to(store: Path, find: Find) -> None:
    version = publish(store, tiny_models.request(store))
    demo.make(store / "Tiny")
    model = find()
    assert model.directory == version
    assert model.manifest_sha256 == "ab" * 32


def test_published_link_of_the_plain_name_must_be_this_models(store: Path, find: Find) -> None:
    publish(store, tiny_models.request(store, "other/Tiny"), "Tiny")
    with pytest.raises(ModelNotFound, match="is a link to another model, other-Tiny"):
        find()


def test_hashed_link_that_leaves_the_published_versions(store: Path, tmp_path: Path, find: Find) -> None:
    demo.make(tmp_path / "elsewhere")
    (store / label(tiny_models.request(store))).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelNotFound, match=r"does not lead into \.published"):
        find()


def test_published_link_that_leads_nowhere(store: Path, find: Find) -> None:
    (store / label(tiny_models.request(store))).symlink_to(".published/x/y")
    with pytest.raises(ModelNotFound, match="is a link that does not lead"):
        find()


@pytest.mark.parametrize("revision", ["", "v1"])
def test_hashed_directory_of_the_existing_tools(store: Path, find: Find, revision: str) -> None:
    asked = tiny_models.request(store, revision=revision)
    directory = demo.make(store / f"Tiny.{hash12(asked.identity)}")
    with pytest.raises(ModelNotFound, match=r"has no \.vllm-model-provenance"):
        find(revision=revision)
    tiny_models.write_provenance(directory, asked)
    assert find(revision=revision).directory == directory


@pytest.mark.parametrize(
    "changes",
    [{"complete": "0"}, {"model_id": "other/Tiny"}, {"model_identity": "x"}, {"identity_hash": "x"}, {"model_revision": "v2"}, {"model": "Big"}],
)
@pytest.mark.parametrize("name", ["Tiny", "Tiny.{hash12}"])
def test_provenance_of_another_model_rules_a_directory_out(store: Path, find: Find, changes: dict[str, str], name: str) -> None:
    asked = tiny_models.request(store)
    directory = demo.make(store / name.format(hash12=hash12(asked.identity)))
    tiny_models.write_provenance(directory, asked, **changes)
    with pytest.raises(ModelNotFound, match="in its provenance"):
        find()


def test_plain_name_says_nothing_of_a_revision(store: Path, find: Find) -> None:
    demo.make(store / "Tiny")
    with pytest.raises(ModelNotFound, match=r"says nothing of revision v1; give its path"):
        find(revision="v1")


def test_given_path_is_the_only_place(store: Path, tmp_path: Path, find: Find) -> None:
    demo.make(store / "Tiny")
    given = demo.make(tmp_path / "given")
    assert find(path=str(given)).directory == given
    with pytest.raises(ModelNotFound, match="absent does not exist"):
        find(path=str(tmp_path / "absent"))
    with pytest.raises(ModelNotFound, match="is no directory"):
        find(path=str(given / "config.json"))


def test_broken_main_snapshot_gives_way_to_the_older_good_one(store: Path, find: Find, told: Told) -> None:
    good = tiny_models.snapshot(store / "hub", "acme/Tiny", "good", mtime_s=1000)
    tiny_models.snapshot(store / "hub", "acme/Tiny", "older", mtime_s=500)
    broken = tiny_models.snapshot(store / "hub", "acme/Tiny", "broken", mtime_s=2000, main=True)
    (broken / SHARD2).resolve().unlink()
    model = find()
    assert (model.directory, model.revision, model.via) == (good, "good", "hf-cache")
    assert f"warning: passed over {broken / SHARD2}" in told.text


def test_main_wins_over_a_newer_snapshot(store: Path, find: Find) -> None:
    tiny_models.snapshot(store / "hub", "acme/Tiny", "newer", mtime_s=2000)
    main = tiny_models.snapshot(store / "hub", "acme/Tiny", "main", mtime_s=1000, main=True)
    assert find().directory == main


def test_revision_is_that_snapshot_or_none(store: Path, find: Find) -> None:
    one = tiny_models.snapshot(store / "hub", "acme/Tiny", "c1", main=True)
    tiny_models.write_ref(one.parents[1], "release/v1", "c1")
    assert find(revision="c1").directory == one
    assert find(revision="release/v1").directory == one
    with pytest.raises(ModelNotFound):
        find(revision="c2")
    broken = tiny_models.snapshot(store / "hub", "acme/Tiny", "c2")
    (broken / SHARD2).unlink()
    with pytest.raises(ModelInvalid):
        find(revision="c2")


@pytest.mark.parametrize("content", ["../../../../etc", "", "c1\nc2", "x" * 10_000, "/etc", ".."])
def test_ref_that_says_nonsense_is_ignored(store: Path, find: Find, content: str) -> None:
    one = tiny_models.snapshot(store / "hub", "acme/Tiny", "c1")
    tiny_models.write_ref(one.parents[1], "main", content)
    assert find().directory == one
    with pytest.raises(ModelNotFound):
        find(revision="main")


def test_snapshot_that_is_a_link_is_none(store: Path, tmp_path: Path, find: Find) -> None:
    demo.make(tmp_path / "elsewhere")
    snapshots = store / "hub/models--acme--Tiny/snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "c1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelNotFound):
        find()
    with pytest.raises(ModelNotFound):
        find(revision="c1")


def test_hub_caches_are_looked_into_in_order(tmp_path: Path) -> None:
    environ = {name: f"/{name}" for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")}
    expected = ["/s/hub", "/HF_HUB_CACHE", "/HUGGINGFACE_HUB_CACHE", "/HF_HOME/hub", "/XDG_CACHE_HOME/huggingface/hub", "/HOME/.cache/huggingface/hub"]
    assert [str(root) for root in hf_cache.roots(Path("/s"), environ)] == expected
    assert list(hf_cache.roots(Path("/s"), {"HF_HOME": "relative"})) == [Path("/s/hub")]


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_model_in_a_hub_cache_elsewhere(tmp_path: Path, find: Find, variable: str) -> None:
    one = tiny_models.snapshot(tmp_path / "cache", "acme/Tiny", "c1", main=True)
    assert find(environ={variable: str(tmp_path / "cache")}).directory == one


def test_bundled_model(tmp_path: Path, find: Find) -> None:
    one = tiny_models.snapshot(tmp_path / "env/share/models/hub", "acme/Tiny", "c1", main=True)
    model = find(tiny_models.settings(flox_env=str(tmp_path / "env")))
    assert (model.directory, model.via) == (one, "bundled")


def test_no_source_has_it_names_each_sources_reason(store: Path, find: Find) -> None:
    with pytest.raises(ModelNotFound) as caught:
        find()
    for reason in (
        "bundled: skipped (FLOX_ENV not set)",
        f"local: not found (no Tiny in {store})",
        f"hf-cache: not found (not in {store}/hub)",
        "r2: skipped (offline)",
        "hf-hub: skipped (offline)",
    ):
        assert reason in caught.value.what
    assert str(store / "Tiny") in caught.value.hint


def test_invalid_model_gives_way_to_a_source_that_has_it_whole(store: Path, find: Find, told: Told) -> None:
    (demo.make(store / "Tiny") / SHARD2).unlink()
    one = tiny_models.snapshot(store / "hub", "acme/Tiny", "c1", main=True)
    assert find().directory == one
    assert "Checking local directory... failed (" in told.text


def test_invalid_model_that_no_other_source_has_is_65(store: Path, find: Find) -> None:
    (demo.make(store / "Tiny") / SHARD2).unlink()
    with pytest.raises(ModelInvalid) as caught:
        find()
    assert SHARD2 in caught.value.what
    assert "hf-cache: not found" in caught.value.what


@pytest.mark.parametrize(
    ("number", "kind", "status"),
    [(13, PermissionMissing, 77), (5, StorageFailed, 74), (28, StorageFailed, 74), (30, StorageFailed, 74)],
)
def test_what_the_file_system_refuses_is_said_with_path_and_status(
    store: Path, find: Find, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[VllmdError], status: int
) -> None:
    directory = demo.make(store / "Tiny")

    def fail(path: Path) -> object:
        raise OSError(number, os.strerror(number), str(path / "config.json"))

    monkeypatch.setattr("vllmd.models.validate.take", fail)
    with pytest.raises(kind, match=str(directory / "config.json")) as caught:
        find()
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("closed", "source", "named"),
    [
        ("models/Tiny/config.json", "local", "models/Tiny/config.json"),
        ("models/Tiny/" + SHARD2, "local", SHARD2),
        ("models/Tiny", "local", "models/Tiny"),
        ("models", "local", "models"),
        ("models", "hf-cache", "models/hub"),
        ("models/hub/models--acme--Tiny/snapshots", "hf-cache", "snapshots"),
    ],
)
def test_permission_that_is_missing_is_77_with_path_and_user(open_path: Path, told: Told, closed: str, source: str, named: str) -> None:
    """By a real other user, since root may read anything."""
    need(os.geteuid() == 0, "root, to become another user")
    store = open_path / "models"
    demo.make(store / "Tiny")
    tiny_models.snapshot(store / "hub", "acme/Tiny", "c1", main=True)
    (open_path / closed).chmod(0)

    def attempt() -> str:
        try:
            return str(resolve(tiny_models.request(store, sources=(source,)), tiny_models.settings(), {}, told).directory)
        except PermissionMissing as error:
            return f"{error.status} {error.what}"

    said = as_nobody(attempt)
    assert said.startswith("77 ")
    assert named in said
    assert "user nobody" in said


def test_store_that_cannot_be_written_is_used_without_a_lock(open_path: Path) -> None:
    need(os.geteuid() == 0, "root, to become another user")
    directory = demo.make(open_path / "models/Tiny")
    told = Told()

    def attempt() -> str:
        asked, settings = tiny_models.request(open_path / "models"), tiny_models.settings(verify="sha256")
        model = verified(resolve(asked, settings, {}, told), asked, settings, told)
        return f"{model.directory}\n{told.text}"

    said = as_nobody(attempt)
    assert said.startswith(f"{directory}\n")
    assert "going on without a lock" in said
    assert "cannot be remembered" in said


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(action: Callable[[], str]) -> str:
    """What `action` returns in a process of the user nobody. What it imports must be imported before."""
    import blake3 as blake3

    from vllmd.models import verify as verify

    for name in sources.names():
        sources.get(name)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, action().encode())
        except BaseException as error:  # nothing may escape into pytest's copy
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        return os.read(reader, 65536).decode()
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


def test_unreadable_default_cache_of_the_user_is_no_failure(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, asked: ModelRequest) -> list[object]:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(hub, "candidates", fail)
    with pytest.raises(PermissionMissing):
        find()  # the store's own hub/ was chosen
    monkeypatch.setattr(hub, "candidates", lambda root, asked: fail(root, asked) if str(root).startswith("/home") else [])
    with pytest.raises(ModelNotFound, match=r"/home/x/.cache/huggingface/hub cannot be read"):
        find(environ={"HOME": "/home/x"})


def test_crash_between_the_two_renames_of_todays_tool_is_repaired(store: Path, find: Find, told: Told) -> None:
    for name, mtime_s in (("old", 1000), ("new", 2000)):
        backup = demo.make(store / f"Tiny.bak.{name}", shards=1 if name == "old" else 2)
        (backup / ".complete").touch()
        os.utime(backup, (mtime_s, mtime_s))
    model = find()
    assert model.directory == store / "Tiny"
    assert (store / "Tiny" / SHARD2).exists()
    assert (store / "Tiny.bak.old").exists()
    assert f"restored {store}/Tiny from Tiny.bak.new" in told.text


def test_copy_that_a_person_made_is_no_backup_of_ours(store: Path, find: Find) -> None:
    demo.make(store / "Tiny.bak.2026")
    with pytest.raises(ModelNotFound):
        find()
    assert (store / "Tiny.bak.2026").is_dir()


def test_backup_is_left_alone_while_the_model_is_there(store: Path, find: Find) -> None:
    demo.make(store / "Tiny")
    demo.make(store / "Tiny.bak.x")
    find()
    assert (store / "Tiny.bak.x").exists()


def test_store_that_does_not_exist_is_no_error_of_its_own_and_is_not_made(tmp_path: Path, told: Told) -> None:
    with pytest.raises(ModelNotFound):
        resolve(tiny_models.request(tmp_path / "a/b/c"), tiny_models.settings(), {}, told)
    assert not (tmp_path / "a").exists()
    assert "lock" not in told.text


def test_given_path_needs_no_store_until_there_is_something_to_remember(tmp_path: Path, told: Told) -> None:
    directory = demo.make(tmp_path / "given")
    asked = tiny_models.request(tmp_path / "a/models", path=str(directory))
    model = resolve(asked, tiny_models.settings(), {}, told)
    assert not (tmp_path / "a").exists()
    verified(model, asked, tiny_models.settings(verify="sha256"), told)
    assert len(list((tmp_path / "a/models/.manifests").iterdir())) == 1


def test_report_is_one_object_on_success_and_on_failure(store: Path, told: Told) -> None:
    asked = tiny_models.request(store)
    failure = resolve_report(asked, tiny_models.settings(), {}, told)
    assert (failure["ok"], failure["status"], failure["error"]["code"]) == (False, 66, "model_not_found")
    assert [source["name"] for source in failure["sources"]] == list(tiny_models.SOURCES)
    demo.make(store / "Tiny")
    success = resolve_report(asked, tiny_models.settings(verify="sha256"), {}, told)
    assert (success["ok"], success["status"], success["via"]) == (True, 0, "local")
    assert len(success["manifest_sha256"]) == 64


def test_every_source_of_the_settings_is_registered() -> None:
    from vllmd.config.settings import SOURCES

    assert {sources.get(name).name for name in SOURCES} == set(SOURCES) == set(sources.names())
