"""What several unit tests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.models import demo


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model that is whole."""
    return demo.make(tmp_path / "model")
