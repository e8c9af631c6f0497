"""What a download has so far: STORE/.staging/<label>/, which the next attempt goes on with.

    files/      complete verified files under their final names; becomes the published version by one rename
    parts/      unfinished files, named by the SHA-256 of their name
    journal     what is there of each (models/transfer/journal)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.models.hashing import Digest
from vllmd.models.inventory import is_plain
from vllmd.models.lock import private_directory
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.transfer.journal import Journal, Kept, signature
from vllmd.models.transfer.ranges import Ranges

DIRECTORY = ".staging"
JOURNAL = "journal"
_FICLONE = 0x40049409


@dataclass(slots=True)
class Stage:
    """Needs the identity's lock as long as it lives. `marks`: listed name -> what tells this version of it from others."""

    directory: Path
    journal: Journal
    marks: Mapping[str, str]
    kept: dict[str, Kept]

    @property
    def files(self) -> Path:
        return self.directory / "files"

    @classmethod
    def open(cls, store: Path, label: str, listing: Listing) -> Stage:
        """Made if missing; what is not of this listing is removed. PermissionMissing where a link stands in its place; OSError."""
        directory = private_directory(private_directory(store, DIRECTORY), label)
        for name in ("files", "parts"):
            private_directory(directory, name)
        journal = Journal(directory / JOURNAL)
        stage = cls(directory, journal, {file.name: _mark(file, listing.origin) for file in listing.files}, {})
        wanted = {file.name: file for file in listing.files}
        for name, what in _read(journal).items():
            if name in wanted and what.size == wanted[name].size and what.mark and what.mark == stage.marks[name]:
                stage._take(name, what)
        stage._sweep()
        journal.rewrite(stage.kept)
        return stage

    def have(self) -> Mapping[str, Digest]:
        """Files that were fetched and verified, and are untouched since."""
        return {name: what.done[0] for name, what in self.kept.items() if what.done is not None}

    def adopt(self, name: str, path: Path, digest: Digest, pin: str) -> bool:
        """Take an identical file of a published version, without copying a byte; False where the file system cannot. `pin` is
        the listed one. OSError for a stage that cannot be written."""
        del pin  # the listing's, which `marks` has
        target = self.final_path(name)
        size = path.stat().st_size
        if not _linked(path, target) and not _cloned(path, target):
            return False
        self.kept[name] = Kept(self.marks[name], size, Ranges([(0, size)]), done=(digest, signature(target.lstat())))
        self.journal.began(name, self.marks[name], size)
        self.journal.done(name, digest, target.lstat())
        return True

    def remaining_bytes(self, listing: Listing) -> int:
        """What a download still has to write to the disk."""
        return listing.bytes - sum(self.kept[file.name].ranges.bytes for file in listing.files if file.name in self.kept)

    def remove(self) -> None:
        """OSError."""
        shutil.rmtree(self.directory)

    def part_path(self, name: str) -> Path:
        return self.directory / "parts" / hashlib.sha256(name.encode()).hexdigest()[:32]

    def final_path(self, name: str) -> Path:
        """Where the complete file belongs; the directories above it are made. OSError."""
        if not is_plain(name):
            raise OSError(errno.EINVAL, "no name within a model's directory", name)
        directory = self.files
        for part in name.split("/")[:-1]:
            directory = private_directory(directory, part)
        return directory / name.rpartition("/")[2]

    def _take(self, name: str, what: Kept) -> None:
        """Believe the journal as far as the files are there."""
        final, part = self.final_path(name), self.part_path(name)
        if what.done is not None:
            if _signed(part) == what.done[1]:
                part.rename(final)  # killed between the two
            if _signed(final) == what.done[1]:
                self.kept[name] = what
            return
        if _signed(part) is None and _signed(final) is not None and final.lstat().st_nlink == 1:
            final.rename(part)  # complete, but nobody knows whether a power cut spared it: hashed again
        status = _signed(part)
        if status is not None and what.ranges.bytes and status[0] >= max(end for _, end in what.ranges):
            self.kept[name] = what

    def _sweep(self) -> None:
        """Remove what the journal does not vouch for, and every link and whatever else is no file of ours."""
        finals = {self.files / name for name, what in self.kept.items() if what.done is not None}
        parts = {self.part_path(name) for name, what in self.kept.items() if what.done is None}
        for path in (*_leaves(self.files), *_leaves(self.directory / "parts")):
            if path not in finals and path not in parts:
                path.unlink()
        _remove_empty(self.files)


def _mark(file: RemoteFile, origin: str) -> str:
    """The same wherever the same bytes come from, if their SHA-256 is listed; '' where nothing tells versions apart, so that
    what an earlier attempt left cannot be gone on with."""
    if file.sums.get("sha256"):
        return f"sha256:{file.sums['sha256']}"
    return f"{origin} {file.pin}" if file.pin else ""


def _read(journal: Journal) -> dict[str, Kept]:
    """A journal that is no file of ours is none."""
    try:
        return journal.read()
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL, errno.EFBIG):
            raise
        return {}


def _signed(path: Path) -> tuple[int, int, int] | None:
    """None for what is no plain file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return signature(status) if stat.S_ISREG(status.st_mode) else None


def _leaves(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _leaves(path)
        else:
            yield path


def _remove_empty(directory: Path) -> None:
    for path in [path for path in directory.iterdir() if path.is_dir()]:
        _remove_empty(path)
        with contextlib.suppress(OSError):
            path.rmdir()


def _linked(path: Path, target: Path) -> bool:
    try:
        target.unlink(missing_ok=True)
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _cloned(path: Path, target: Path) -> bool:
    source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.ioctl(fd, _FICLONE, source)
        except OSError:
            target.unlink()
            return False
        finally:
            os.close(fd)
    finally:
        os.close(source)
    return True
