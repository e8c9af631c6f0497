"""What a test needs of the machine: missing, it is skipped by name for a person, and is a failure in CI."""

from __future__ import annotations

import os

import pytest


def need(condition: bool, what: str) -> None:
    """Goes on only if `condition` holds; `what` names the need ('root', 'systemd-nspawn')."""
    if condition:
        return
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"CI must have it: needs {what}", pytrace=False)
    pytest.skip(f"needs {what}")
