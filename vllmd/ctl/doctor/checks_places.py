"""Owners, modes, locks and room. Pure.

Below the state directory the service's account can replace any name by a link at any time, and the commands are root's: what
follows links (chmod) is done as that account, and chown is told not to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllmd.config.paths import Paths
from vllmd.ctl.doctor.facts import Disk, Place, PlaceFacts, Service
from vllmd.ctl.doctor.finding import Finding, Unseen, command

FULL_BYTES = 256 << 20
LOW_BYTES = 2 << 30
LOW_SHARE = 0.02
FULL_INODES, LOW_INODES = 64, 2000
_OTHERS_WRITE = 0o002
_PRIVATE = 0o600


def check(paths: Paths, facts: PlaceFacts, service: Service | None) -> Iterator[Finding | Unseen]:
    owner = service or Service("root", 0)
    yield from _configuration(facts.folders[0], is_system=paths.scope == "system")
    for place in facts.folders[1:]:
        yield from _folder(paths, place, owner)
    for place in (*facts.keys, *facts.credentials, *facts.published, *facts.engines):
        if place.error:
            yield Unseen(place.path, place.error)
    for place in facts.keys:
        yield from _keys(place, owner)
    for place in facts.published:
        if place.kind == "file" and place.mode & 0o007:
            yield Finding("credentials-open", place.path, f"has mode {place.mode:04o}: every user of this host can use the key", _as(owner, "chmod", "o-rwx", place.path), severity="warning")
    for place in facts.credentials:
        yield from _credential(place)
    yield from _engines(paths, facts.engines)
    for place, folder in facts.locks:
        yield from _lock(place, folder, owner)
    yield from _held(facts)


def _configuration(place: Place, *, is_system: bool) -> Iterator[Finding | Unseen]:
    if place.error:
        yield Unseen(place.path, place.error)
    elif not place.kind and is_system:
        yield Finding("configuration-missing", place.path, "does not exist", command("mkdir", "-p", "-m", "0755", place.path))
    elif is_system and (place.uid != 0 or place.mode & _OTHERS_WRITE):
        mend = command("chown", "root", place.path) + " && " + command("chmod", "go-w", place.path)
        yield Finding("configuration-writable", place.path, f"{_is(place)}: who can write there decides what runs", mend)


def _folder(paths: Paths, place: Place, owner: Service) -> Iterator[Finding | Unseen]:
    is_system = paths.scope == "system"
    uid, mode = (0, 0o1775) if place.path == str(paths.runtime) else (0, 0o755) if place.path == str(paths.runtime / "i") else (owner.uid, 0o755)
    uid = uid if is_system else owner.uid
    if place.error:
        yield Unseen(place.path, place.error)
    elif not place.kind:
        if is_system:
            below = next(str(each) for each in (paths.runtime, paths.state, paths.cache) if place.path.startswith(str(each)))
            yield Finding("directory-missing", place.path, "does not exist", command("systemd-tmpfiles", "--create", f"--prefix={below}"))
    elif place.kind != "directory":
        yield Finding("directory-wrong", place.path, f"is a {place.kind} where a directory should be", note="move it away, then: systemd-tmpfiles --create")
    elif place.uid != uid:
        name = owner.user if uid == owner.uid else "root"
        yield Finding("directory-owner", place.path, f"belongs to user {place.uid}, not to {name}", command("chown", "-h", f"{name}:{owner.user}", place.path))
    elif place.mode & _OTHERS_WRITE or place.mode & 0o700 != 0o700 or (is_system and uid == 0 and place.mode != mode):
        words = ("chmod", f"{mode:04o}", place.path)
        yield Finding("directory-mode", place.path, f"has mode {place.mode:04o}, not {mode:04o}", command(*words) if uid == 0 else _as(owner, *words))


def _keys(place: Place, owner: Service) -> Iterator[Finding]:
    if place.kind in ("", "link"):
        return
    if place.uid != owner.uid:
        mend = command("chown", "-h", f"{owner.user}:{owner.user}", place.path) + " && " + _as(owner, "chmod", "0600", place.path)
        yield Finding("keys-owner", place.path, f"belongs to user {place.uid}, not to {owner.user}: the instance cannot read its keys", mend)
    elif place.mode != _PRIVATE:
        yield Finding("keys-mode", place.path, f"has mode {place.mode:04o}, not 0600: others may read the keys of clients", _as(owner, "chmod", "0600", place.path))


def _credential(place: Place) -> Iterator[Finding]:
    if place.kind == "file" and (place.uid != 0 or place.mode & 0o077):
        mend = command("chown", "root:root", place.path) + " && " + command("chmod", "0600", place.path)
        yield Finding("credential-open", place.path, f"{_is(place)}: others than root may read the secret", mend)
    if place.kind == "file" and not place.size:
        yield Finding("credential-empty", place.path, "is empty", command("install", "-m", "0600", "/dev/stdin", place.path), asks="the secret")


def _engines(paths: Paths, places: Sequence[Place]) -> Iterator[Finding]:
    """Root executes what lies there (`vllmctl engine`)."""
    wrong = [each for each in places if each.kind == "directory" and ((each.uid != 0 and paths.scope == "system") or each.mode & 0o022)]
    if wrong:
        owner = "chown -Rh root:root" if paths.scope == "system" else "true"
        mend = f"{owner} {command(str(paths.engines))} && " + command("chmod", "-R", "go-w", str(paths.engines))
        yield Finding("engine-writable", wrong[0].path, f"{_is(wrong[0])}: who can write there decides what runs", mend)


def _lock(place: Place, folder: Place, owner: Service) -> Iterator[Finding]:
    """As system/lockfile judges it when the service opens it."""
    why = ""
    if place.kind not in ("", "file"):
        why = f"is a {place.kind}"
    elif place.links > 1:
        why = "has other hard links"
    elif place.kind and place.uid not in (owner.uid, folder.uid):
        why = f"belongs to user {place.uid}"
    elif place.kind and place.uid == owner.uid and place.mode & 0o600 != 0o600:
        why = f"has mode {place.mode:04o}"
    if why:
        yield Finding("lock-stale", place.path, f"{why}: the instance refuses to use it, and does not start", command("rm", "-rf" if place.kind == "directory" else "-f", place.path))


def _held(facts: PlaceFacts) -> Iterator[Finding]:
    for lock in facts.held:
        if not lock.unit.startswith("vllmd"):
            who = f"process {lock.pid} ({lock.comm})" + (f" of {lock.unit}" if lock.unit else "")
            yield Finding("lock-held", lock.path, f"is held by {who}, which is no instance's: a start ends with status 75", command("kill", str(lock.pid)), f"look at it first: ps -fp {lock.pid}", severity="warning")


def _as(owner: Service, *words: str) -> str:
    return command("runuser", "-u", owner.user, "--", *words) if owner.uid else command(*words)


def _is(place: Place) -> str:
    return f"belongs to user {place.uid} and has mode {place.mode:04o}"


# -- disks


def disks(found: Sequence[Disk], vllmctl: str) -> Iterator[Finding]:
    """One finding for each file system."""
    for several in {each.device: [other for other in found if other.device == each.device] for each in found}.values():
        first = several[0]
        where = ", ".join(dict.fromkeys(each.path for each in several))
        if first.is_read_only:
            yield Finding("disk-read-only", where, "the file system is mounted read-only", command("mount", "-o", "remount,rw", first.mount), "the kernel does that after errors: journalctl -k -p err")
            continue
        yield from _room(where, several, vllmctl)


def _room(where: str, several: Sequence[Disk], vllmctl: str) -> Iterator[Finding]:
    first, mend, note = several[0], *_to_free(several, vllmctl)
    if first.total_bytes and first.free_bytes < min(FULL_BYTES, first.total_bytes // 4):
        yield Finding("disk-full", where, f"{_mib(first.free_bytes)} of {_mib(first.total_bytes)} are free", mend, note)
    elif first.total_bytes and first.free_bytes < min(LOW_BYTES, first.total_bytes * LOW_SHARE):
        yield Finding("disk-low", where, f"{_mib(first.free_bytes)} of {_mib(first.total_bytes)} are free", mend, note, severity="warning")
    if first.inodes and first.free_inodes < FULL_INODES:
        yield Finding("inodes-gone", where, f"{first.free_inodes} inodes are free", mend, "df -i shows them")
    elif first.inodes and first.free_inodes < min(LOW_INODES, first.inodes * LOW_SHARE):
        yield Finding("inodes-low", where, f"{first.free_inodes} inodes are free", mend, "df -i shows them", severity="warning")


def _to_free(several: Sequence[Disk], vllmctl: str) -> tuple[str, str]:
    roles = {each.role: each for each in several}
    commands = [f"{vllmctl} store gc --dir {command(each.path)}" for each in several if each.role == "store"]
    commands += [f"{vllmctl} cache clear --unused"] if "cache" in roles else []
    note = f"then what nobody needs: {vllmctl} store list, {vllmctl} store rm ID" if "store" in roles else ""
    return "; ".join(commands), note or "df -h shows it"


def _mib(amount: int) -> str:
    return f"{amount / (1 << 30):.1f} GiB" if amount >= 10 << 30 else f"{amount >> 20} MiB"
