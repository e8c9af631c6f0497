"""Publishing: what lies where afterwards, what is kept, and what stays as it was when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import publishing, tiny_models
from vllmd.config.settings import Model
from vllmd.models import contents as manifests
from vllmd.models import publish
from vllmd.models.identity import hash12, label
from vllmd.models.resolve import resolve

pytestmark = pytest.mark.component


def nothing(_: object) -> None:
    pass


def test_published_model_is_found_by_every_name_with_nothing_left_over(tmp_path: Path) -> None:
    asked = tiny_models.request(tmp_path)
    directory = publishing.publish_version(tmp_path, 1)
    for name in (label(asked), f"Tiny.{hash12(asked.identity)}", "Tiny"):
        assert (tmp_path / name).is_symlink()
        assert not (tmp_path / name).readlink().is_absolute()
        assert (tmp_path / name).resolve() == directory
    model = resolve(asked, Model(), {}, nothing)
    assert (model.directory, model.via, model.manifest_sha256) == (directory, "local", directory.name)
    assert (publishing.wrong(tmp_path, asked), publishing.half(tmp_path)) == ([], [])
    found = publish.current(tmp_path, asked)
    assert found is not None
    assert found == (directory, manifests.read(directory))
