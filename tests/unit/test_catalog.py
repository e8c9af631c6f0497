"""The parts of the store's listing that need no store: locks as the kernel lists them, the tar stream, the table, what is surplus."""

from __future__ import annotations

import contextlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmd.ctl.store_gc import surplus
from vllmd.ctl.store_list import table
from vllmd.models.catalog import Catalog, Item
from vllmd.models.inuse import Flocks
from vllmd.models.measure import Measure
from vllmd.models.tarstream import END, Reader, TarDamaged, header, padding

pytestmark = pytest.mark.unit

LOCKS = """1: FLOCK  ADVISORY  READ 42 fe:01:131 0 EOF
1: -> FLOCK  ADVISORY  WRITE 43 fe:01:131 0 EOF
2: POSIX  ADVISORY  WRITE 44 fe:01:131 0 EOF
3: FLOCK  ADVISORY  READ 45 00:2d:131 0 EOF
4: OFDLCK ADVISORY  READ -1 00:05:26 0 EOF
5: FLOCK
6: FLOCK  ADVISORY  READ 46 fe:01:nonsense 0 EOF
"""


def test_only_held_flocks_are_taken_from_the_kernels_list(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text(LOCKS)
    flocks = Flocks.read(tmp_path / "locks")
    assert {lock.pid for locks in flocks.by_inode.values() for lock in locks} == {42, 45}
    assert Flocks.read(tmp_path / "none").by_inode == {}


def test_inode_alone_counts_for_what_is_known_to_be_held(tmp_path: Path) -> None:
    """btrfs shows another device to stat than to the lock list; another file system has the same inode numbers."""
    inode = tmp_path.stat().st_ino
    (tmp_path / "locks").write_text(f"1: FLOCK  ADVISORY  READ 42 ff:ff:{inode} 0 EOF\n")
    flocks = Flocks.read(tmp_path / "locks")
    assert flocks.holders(tmp_path) == frozenset()
    assert flocks.holders(tmp_path, is_known_held=True) == {42}
    assert flocks.holders(tmp_path / "gone", is_known_held=True) == frozenset()


def item(version: str, name: str = "a.0", **changes: object) -> Item:
    base = Item("published", "acme/Tiny", name, Path(f"/store/.published/{name}/{version}"), Measure(), version=version, created_at=version)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_surplus_is_old_and_nobodys() -> None:
    items = (
        item("1"),
        item("2", is_pinned=True),
        item("3", is_current=True),
        item("4"),
        item("5", names=("Tiny",)),
        item("6"),
        item("1", "b.0"),
        item("7", kind="hub-cache"),
    )
    found = Catalog(Path("/store"), items)
    assert [each.version for each in surplus(found, 2)] == ["4", "1"]
    assert surplus(found, 9) == []


def test_table_is_as_wide_as_its_widest_and_leaves_out_empty_columns() -> None:
    lines = list(table([("MODEL", "REVISION", "SIZE", ""), ("a", "", "1 byte", "x"), ("long-name", "", "12.3 GB", "")]))
    assert lines == ["MODEL         SIZE", "a           1 byte  x", "long-name  12.3 GB"]


def read_all(data: bytes) -> dict[str, bytes]:
    reader, found = Reader(io.BytesIO(data).read), {}
    while (member := reader.next()) is not None:
        found[member.name] = b"".join(iter(lambda: reader.take(1000), b""))
    return found


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300).filter(lambda name: not name.endswith("/"))


@settings(max_examples=30)
@given(st.dictionaries(NAMES, st.binary(max_size=3000), max_size=5))
def test_what_is_written_is_read_by_us_and_by_tar(files: dict[str, bytes]) -> None:
    data = b"".join(header(name, len(content)) + content + padding(len(content)) for name, content in files.items()) + END
    assert read_all(data) == files
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [member.size for member in tar] == [len(content) for content in files.values()]


@settings(max_examples=50)
@given(st.binary(max_size=4000))
def test_noise_is_damage_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(TarDamaged):
        read_all(data)


@settings(max_examples=50)
@given(st.data())
def test_damaged_archive_is_damage_or_other_files_and_nothing_else(data: st.DataObject) -> None:
    whole = bytearray(header("a" * 150, 700) + bytes(700) + padding(700) + header("b", 1 << 35) + END)
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TarDamaged):
        read_all(bytes(whole))


@pytest.mark.parametrize("records", [b"99 path=x\n", b"x path=x\n", b"0 path=x\n", b"10 size=-9\n", b"11 size=abc\n", b"-5 path=x\n", b"1 1 1 1 1 1"])
def test_pax_header_that_lies_is_damage(records: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records + padding(len(records)) + header("a", 0) + END
    with pytest.raises(TarDamaged):
        read_all(data)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"S", b"g", b"Z"])
def test_only_plain_files_are_taken(kind: bytes) -> None:
    info = tarfile.TarInfo("a")
    info.type = kind
    with pytest.raises(TarDamaged, match="holds 'a', which is "):
        read_all(info.tobuf(tarfile.USTAR_FORMAT) + END)


def test_pax_header_of_a_gigabyte_is_not_read() -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    asked: list[int] = []
    stream = io.BytesIO(info.tobuf(tarfile.USTAR_FORMAT) + bytes(5000))

    def read(count: int) -> bytes:
        asked.append(count)
        return stream.read(count)

    with pytest.raises(TarDamaged):
        Reader(read).next()
    assert max(asked) <= 1 << 16
