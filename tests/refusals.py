"""Models that must be refused, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.errors import ModelInvalid, Status
from vllmd.models.validate import Checks, validate

SHARD1, SHARD2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refusal(directory: Path, checks: Checks | None = None) -> ModelInvalid:
    with pytest.raises(ModelInvalid) as caught:
        validate(directory, checks or Checks())
    assert caught.value.status is Status.DATAERR
    assert caught.value.hint
    return caught.value
