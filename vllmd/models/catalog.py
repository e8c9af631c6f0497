"""What lies in a store, for people: published versions, hub caches, a user's own directories, unfinished downloads.

Reads names, sizes and manifests, takes no lock and changes nothing. What it lists is also all that may be removed: a command
that is given a name takes the entry that has it, and never makes a path of it.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllmd.models import catalog_hub as hub
from vllmd.models import contents as manifests
from vllmd.models import kept, links, pins, published
from vllmd.models.identity import hash12
from vllmd.models.inuse import Flocks, is_held
from vllmd.models.leftovers import STAGING
from vllmd.models.lock import DIRECTORY as LOCKS
from vllmd.models.measure import Measure, measured
from vllmd.models.places import is_directory, is_real_directory, present
from vllmd.models.store import PUBLISHED, published_target

IMPORTED = "import."
"""Before the label: the stage of an import, which is not gone on with."""
PUBLISHED_KIND, HUB_KIND, LOCAL_KIND, UNFINISHED_KIND = "published", "hub-cache", "local", "unfinished"


@dataclass(frozen=True, slots=True)
class Item:
    """One entry. `name` is unique within its kind and version: the label, the hub cache's directory, the user's own name.

    `identity` is ID or ID@REVISION. `bytes` are those of its regular files, each counted once; `linked` says which of them other
    entries may have too. `last_used` in seconds since 1970. `names` are the links of the store that lead to it.
    """

    kind: str
    identity: str
    name: str
    directory: Path
    size: Measure
    revision: str = ""
    version: str = ""
    source: str = ""
    origin: str = ""
    created_at: str = ""
    is_current: bool = False
    is_pinned: bool = False
    is_held: bool = False
    kept_for: tuple[str, ...] = ()
    """Instances that could go back to it (models/kept)."""
    damaged: tuple[str, ...] = ()
    last_used: float = 0.0
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    snapshots: tuple[Path, ...] = ()
    held_at: tuple[Path, ...] = ()
    """Where those who use it hold their locks."""

    @property
    def id(self) -> str:
        return self.identity.partition("@")[0]

    @property
    def bytes(self) -> int:
        return self.size.bytes

    @property
    def calls(self) -> frozenset[str]:
        """What a person may call it."""
        return frozenset({self.id, self.identity, self.name, *self.names})


@dataclass(frozen=True, slots=True)
class Catalog:
    store: Path
    items: tuple[Item, ...]
    shared: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Inode -> size of the files that several entries have."""

    @property
    def bytes(self) -> int:
        """On the disk: what is shared counts once."""
        return sum(item.bytes - self.shared_bytes(item) for item in self.items) + sum(self.shared.values())

    def shared_bytes(self, item: Item) -> int:
        return sum(size for inode, size in item.size.linked.items() if inode in self.shared)

    def called(self, name: str) -> list[Item]:
        """The entries that have exactly this name, id or identity."""
        return [item for item in self.items if name in item.calls]


def take(store: Path) -> Catalog:
    """Everything in the store, in order of id; an empty one where there is no store. OSError."""
    if not present(store):
        return Catalog(store, ())
    items = sorted((*_published(store), *_hub(store), *_local(store), *_unfinished(store)), key=_order)
    counted = Counter(inode for item in items for inode in item.size.linked)
    sizes = {inode: size for item in items for inode, size in item.size.linked.items()}
    return Catalog(store, tuple(items), {inode: sizes[inode] for inode, count in counted.items() if count > 1})


def _order(item: Item) -> tuple[str, str, str, bool, str]:
    return (item.id.casefold(), item.identity, item.kind, not item.is_current, item.created_at)


def _published(store: Path) -> Iterator[Item]:
    led_to, pinned, keepers = links.leading_to(store), pins.pinned(store), kept.read(store)
    for directory in published.directories(store):
        yield from _seen(PUBLISHED_KIND, directory.parent.name, directory, lambda path: _version(path, led_to, pinned, keepers))


def _seen(kind: str, identity: str, path: Path, look: Callable[[Path], Item]) -> Iterator[Item]:
    """The entry; nothing where it vanished meanwhile, and its name alone where it may not be read."""
    try:
        yield look(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        name = path.parent.name if kind == PUBLISHED_KIND else path.name
        yield Item(kind, _printable(identity), name, path, Measure(), notes=("not readable",))


def _version(directory: Path, led_to: Mapping[str, list[Path]], pinned: Iterable[str], keepers: Mapping[str, tuple[str, ...]]) -> Item:
    label = directory.parent.name
    names = sorted(path.name for path in led_to.get(os.path.realpath(directory), ()))
    contents = published.manifest_of(directory)
    return Item(
        kind=PUBLISHED_KIND,
        identity=_printable(contents.identity) if contents else label,
        name=label,
        directory=directory,
        size=measured(directory),
        revision=_printable(contents.revision) if contents else "",
        version=directory.name,
        source=_printable(contents.source) if contents else "",
        origin=_printable(contents.origin) if contents else "",
        created_at=_printable(contents.created_at) if contents else "",
        is_current=label in names,
        is_pinned=directory.name in pinned,
        kept_for=keepers.get(directory.name, ()),
        is_held=is_held(directory),
        held_at=(directory,),
        damaged=tuple(sorted(published.damaged(directory))) if contents else (manifests.FILE,),
        last_used=directory.stat().st_mtime,
        names=tuple(name for name in names if name != label),
    )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _hub(store: Path) -> Iterator[Item]:
    for repository in (*hub.repositories(store / "hub"), *hub.repositories(store)):
        yield from _seen(HUB_KIND, hub.model_id(repository), repository, _repository)


def _repository(repository: Path) -> Item:
    snapshots = hub.snapshots(repository)
    notes = () if snapshots else ("no snapshot",)
    return Item(
        kind=HUB_KIND,
        identity=hub.model_id(repository),
        name=repository.name,
        directory=repository,
        size=measured(repository),
        revision=hub.revision(repository),
        is_held=any(map(is_held, snapshots)),
        held_at=snapshots,
        last_used=hub.last_used(repository, snapshots),
        notes=(*notes, *(("unfinished files",) if hub.unfinished_bytes(repository) else ())),
        snapshots=snapshots,
    )


def _local(store: Path) -> Iterator[Item]:
    for path in sorted(store.iterdir()):
        if path.name.startswith(".") or path.name == "hub" or hub.is_repository(path) or not _is_own(store, path):
            continue
        yield from _seen(LOCAL_KIND, path.name, path, _directory)


def _directory(path: Path) -> Item:
    real = Path(os.path.realpath(path))
    return Item(
        kind=LOCAL_KIND,
        identity=_printable(path.name),
        name=path.name,
        directory=path,
        size=measured(real),
        is_held=is_held(real),
        held_at=(real,),
        last_used=_used(real),
        notes=(f"link to {_printable(str(real))}",) if path.is_symlink() else (),
    )


def _is_own(store: Path, path: Path) -> bool:
    """A directory, or a link to one that is nothing published."""
    try:
        return is_directory(path) and not (path.is_symlink() and published_target(store, path) is not None)
    except PermissionError:
        return True


def _used(directory: Path) -> float:
    """The newest time at which one of its files was read, as far as the file system notes that, or it was changed."""
    found = directory.stat()
    times = [found.st_mtime]
    with os.scandir(directory) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                times.append(max(status.st_atime, status.st_mtime))
    return max(times)


def _unfinished(store: Path) -> Iterator[Item]:
    staging, flocks = store / STAGING, Flocks.read()
    if not is_real_directory(staging):
        return
    for path in sorted(staging.iterdir()):
        if is_real_directory(path):
            found = _seen(UNFINISHED_KIND, path.name, path, lambda path: _stage(store, path, flocks))
            yield from (item for item in found if item.size.files or item.notes)


def _stage(store: Path, path: Path, flocks: Flocks) -> Item:
    label = path.name.removeprefix(IMPORTED)
    lock = store / LOCKS / f"vllm-model.{label.rpartition('.')[2]}.lock"
    size = measured(path)
    return Item(
        kind=UNFINISHED_KIND,
        identity=_fetched_identity(path.parent, label),
        name=path.name,
        directory=path,
        size=size,
        is_held=bool(flocks.holders(lock)),
        held_at=(lock,),
        last_used=size.newest,
        notes=("import",) if path.name != label and size.files else (),
    )


def _fetched_identity(staging: Path, label: str) -> str:
    """What the log of the fetch says, if the label confirms that; else the label."""
    try:
        with open(os.open(staging / f"{label}.log", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as log:
            words = log.read(4096).decode("utf-8", "replace").split()
    except OSError:
        return label
    named = (word.rstrip(",") for word in words)
    return next((word for word in named if hash12(word) == label.rpartition(".")[2]), label)


def homes(store: Path) -> list[Path]:
    """STORE/.published/<label>, also those without a version. OSError."""
    above = store / PUBLISHED
    return sorted(path for path in above.iterdir() if is_real_directory(path)) if is_real_directory(above) else []
