"""What the daemon and its resolver say to each other survives the way, and nonsense is a failure, never an exception."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny_models
from vllmd.core.model import ResolvedModel
from vllmd.errors import ModelInvalid, ModelNotFound, PermissionMissing, StorageFailed, TryLater, VllmdError
from vllmd.models import wire
from vllmd.models.progress import Progress

pytestmark = pytest.mark.unit


def test_request_arrives_as_it_was_sent() -> None:
    asked = tiny_models.request(Path("/store"), revision="v1")
    settings = tiny_models.settings(hf_token="secret", lock_timeout_s=1.5, sources=("local",))
    line = wire.encode_request(asked, settings)
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert wire.decode_request(line) == (asked, settings)


@pytest.mark.parametrize(
    "event",
    [
        Progress("verify", "local", 1, 2, "verifying\nthings"),
        wire.Resolved(ResolvedModel("acme/Tiny", Path("/m"), "local", "abc", 7, "")),
        wire.Verified("ff"),
    ],
)
def test_event_arrives_as_it_was_sent(event: wire.Event) -> None:
    line = wire.encode_event(event)
    assert b"\n" not in line[:-1]
    assert wire.decode_event(line) == event


@pytest.mark.parametrize("kind", [ModelInvalid, ModelNotFound, PermissionMissing, StorageFailed, TryLater])
def test_error_arrives_with_its_class_and_status(kind: type[VllmdError]) -> None:
    sent = kind("a_code", "what", "hint")
    event = wire.decode_event(wire.encode_event(wire.Failed(sent)))
    assert isinstance(event, wire.Failed)
    assert type(event.error) is kind
    assert event.error.as_dict() == sent.as_dict()


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_nonsense_is_a_failure_of_the_child(line: bytes | str) -> None:
    event = wire.decode_event(line)
    assert isinstance(event, wire.Failed)
    assert event.error.code == "resolver_broken"


@pytest.mark.parametrize(
    "line",
    [
        b'{"event":"resolved","directory":"/m"}',
        b'{"event":"verified","manifest_sha256":3}',
        b'{"event":"failed","error":{"code":"x","what":"y","hint":"","status":999}}',
        b'{"event":"progress","phase":"x"}',
        b"[" * 100_000,
    ],
)
def test_half_an_event_is_a_failure_of_the_child(line: bytes) -> None:
    assert isinstance(wire.decode_event(line), wire.Failed)


def test_fraction_is_known_only_with_a_total() -> None:
    assert Progress("verify", "", 1, 4).fraction == 0.25
    assert Progress("verify", "", 9, 4).fraction == 1.0
    assert Progress("verify").fraction is None
