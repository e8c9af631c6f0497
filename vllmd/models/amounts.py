"""Pure: sizes and times as people read them."""

from __future__ import annotations

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def size(count: int) -> str:
    """Decimal, as disks and networks are sold: '14.2 GB'."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def progress(done: int, total: int, bytes_per_s: int, eta_s: int) -> str:
    """One line: '3.2 of 14.2 GB, 118.0 MB/s, 1 min 33 s left'; without what is not known."""
    said = [f"{size(done)} of {size(total)}"]
    if bytes_per_s > 0:
        said.append(f"{size(bytes_per_s)}/s")
    if eta_s >= 0:
        said.append(f"{duration(eta_s)} left")
    return ", ".join(said)
