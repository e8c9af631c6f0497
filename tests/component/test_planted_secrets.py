"""Secrets planted wherever an instance may have them: nothing that it runs, shows or leaves has them in it, however it fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import ends, quick, stop
from tests.harness import FAKE, MARK, Instance
from tests.ports import free_port
from tests.secret_search import Allowed, Place, files, plant, processes, search

pytestmark = pytest.mark.component

NAMES = ("api-key", "hf-token", "s3-secret", "in-file", "hub", "aws", "other")


def given(instance: Instance, planted: dict[str, str]) -> Instance:
    """All ways at once: systemd's credentials, the configuration, the environment of the supervisor."""
    folder = instance.root / "credentials"
    folder.mkdir()
    (folder / "api-key").write_text(f"{planted['api-key']}\n")
    (folder / "hf-token").write_text(planted["hf-token"])
    (folder / "s3-credentials").write_text(f"[default]\naws_access_key_id = AKID\naws_secret_access_key = {planted['s3-secret']}\n")
    for path in folder.iterdir():
        path.chmod(0o600)
    instance.config["serve"]["api_key"] = planted["in-file"]
    instance.write_config()
    (instance.root / "etc/demo.yaml").chmod(0o600)
    instance.env |= {"CREDENTIALS_DIRECTORY": str(folder), "HF_TOKEN": planted["hub"], "AWS_SECRET_ACCESS_KEY": planted["aws"], "MY_PASSWORD": planted["other"]}
    return instance


def allowed(instance: Instance) -> list[Allowed]:
    return [
        Allowed(f"{instance.root}/credentials/*", "systemd's credentials: 0400, of the service's user alone"),
        Allowed(f"{instance.root}/etc/demo.yaml", "where the administrator wrote the key, 0600"),
        Allowed(f"{instance.root}/etc/.generations/demo/*/demo.yaml", "the same file, put aside by its owner for a rollback, below a directory of mode 0700"),
        Allowed("process supervisor environ", "whoever starts a program with secrets in its environment put them there"),
    ]


def places(instance: Instance) -> Iterator[Place]:
    for process in procs.with_environ(MARK, str(instance.root)):
        for name, content in processes([process.pid]):
            yield (name.replace(process.comm, "supervisor") if process.pid == instance.pid else name), content
    yield from files([instance.root])
    if (instance.runtime / "control.sock").exists():
        for path in ("/status", "/metrics"):
            yield f"control.sock {path}", instance.control(path)[1].encode()
    yield "notify socket", "\n".join(str(dict(message.fields)) for message in instance.notify.messages).encode()


def talkative(instance: Instance) -> None:
    """An engine that prints everything its user can read, colours and all, and then dies of it."""
    program = instance.root / "talkative"
    shown = f"sed -n p {instance.root}/credentials/*; sed 's/^/ValueError: bad key /; s/$/\\x1b[0m!/' {instance.root}/credentials/* >&2; cat {instance.root}/etc/demo.yaml"
    program.write_text(f'#!/bin/sh\n{shown}\nfor each; do case $each in --config) cat "$each";; esac; done\nexec {FAKE} "$@"\n')
    program.chmod(0o755)
    instance.config["engine"]["executable"] = str(program)
    instance.write_config()
    (instance.root / "etc/demo.yaml").chmod(0o600)


def test_an_instance_that_serves_shows_none() -> None:
    planted = plant(*NAMES)
    with given(quick(), planted) as instance:
        instance.wait_ready()
        assert search(planted, places(instance), allowed(instance)) == []
        stop(instance)
        assert search(planted, places(instance), allowed(instance)) == []


def test_an_engine_that_prints_all_it_can_read_before_it_dies_tells_none() -> None:
    planted = plant(*NAMES)
    known = {name: value for name, value in planted.items() if name not in ("hub", "aws", "other")}
    words = "ValueError: neither the key nor the token"
    with given(quick({"FAKE_EXIT_READY": "1@3", "FAKE_ERROR": words}), planted) as instance:
        talkative(instance)
        ends(instance, 70, "engine_exited", ready=True)
        assert list(instance.state.glob("incidents/*/engine.log")), "there is evidence to look into"
        assert "bad key" in instance.log()
        assert search(known, places(instance), allowed(instance)) == []
        assert search(planted, places(instance), allowed(instance)) == []


def sources(**more: Any) -> dict[str, Any]:
    """Nobody listens at either source, so that they are asked again and again."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    return {"model": {"path": "", "id": "acme/Tiny", "sources": ["r2", "hf-hub"], "r2_bucket": "models", "r2_endpoint_url": nowhere, "hf_endpoint": nowhere, **more}}


def test_a_download_that_fails_tells_none_and_its_child_has_what_its_source_needs() -> None:
    planted = plant(*NAMES)
    with given(quick(config=sources(source_timeout_s=4, source_retry_s=1)), planted) as instance:
        instance.wait_state("resolving")
        procs.wait_until("the resolving child", lambda: [each for each in procs.with_environ(MARK, str(instance.root)) if "vllmd.models.fetch" in each.cmdline])
        found = search(planted, places(instance), allowed(instance))
        assert set(found) <= {each for each in found if each.startswith("aws in process")}, "no other secret than the bucket's"
        assert instance.wait_exit() == 66, instance.describe()
        assert search(planted, places(instance), allowed(instance)) == []


def test_the_resolving_child_has_no_key_of_a_bucket_that_is_not_asked() -> None:
    planted = plant(*NAMES)
    with given(quick(config=sources(sources=["hf-hub"], r2_bucket="", source_timeout_s=3, source_retry_s=1)), planted) as instance:
        instance.wait_state("resolving")
        procs.wait_until("the resolving child", lambda: [each for each in procs.with_environ(MARK, str(instance.root)) if "vllmd.models.fetch" in each.cmdline])
        assert search(planted, places(instance), allowed(instance)) == []
        instance.signal(15)
        instance.wait_exit()
