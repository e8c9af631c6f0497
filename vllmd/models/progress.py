"""How far a model is on its way: what is said while it is looked up, fetched and verified."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`phase` is lock, resolve, fetch or verify; `text` one line for a person; `total_bytes` 0 where it is not known;
    `bytes_per_s` over the last seconds; `eta_s` -1 where nobody can say. `level` is '' for what is only true now, info or
    warning for what the journal should keep."""

    phase: str
    source: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    text: str = ""
    bytes_per_s: int = 0
    eta_s: int = -1
    level: str = ""

    @property
    def fraction(self) -> float | None:
        """0 to 1, or None where there is no total."""
        return min(self.done_bytes / self.total_bytes, 1.0) if self.total_bytes else None
