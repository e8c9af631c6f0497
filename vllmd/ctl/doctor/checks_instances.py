"""The instances: their configuration, ports, sources, and what their units may do from the inside. Pure."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from vllmd.config.paths import Paths
from vllmd.ctl.doctor.facts import Failure, HostFacts, InsideFacts, InstanceFacts, PortFacts, SourceFacts
from vllmd.ctl.doctor.finding import Finding, Unseen, command, command_in, split_advice
from vllmd.errors import Status

_TOKEN_CODES = ("hub_token_refused", "hub_token", "hub_gated")
_S3_CODES = ("s3_refused", "s3_credentials")
_STORE = "/etc/credstore"


def configuration(instances: Sequence[InstanceFacts], *, is_root: bool) -> Iterator[Finding | Unseen]:
    said: set[str] = set()
    for each in instances:
        failure = each.failure
        if failure is not None and failure.status == Status.NOPERM and not is_root:
            yield Unseen(f"the configuration of {each.name}", failure.what)
        elif failure is not None:
            yield Finding("configuration", f"instance {each.name}", failure.what, command_in(failure.hint), failure.hint, each.name)
        for warning in each.warnings:
            what, mend = split_advice(warning)
            if warning not in said:
                said.add(warning)
                yield Finding("configuration-warning", f"instance {each.name}", what, mend, instance=each.name, severity="warning")


def ports(found: Sequence[PortFacts], paths: Paths, host: HostFacts) -> Iterator[Finding]:
    seen: dict[tuple[str, int], str] = {}
    for each in found:
        where = f"{each.host}:{each.port}"
        other = seen.setdefault((each.host, each.port), each.instance)
        if other != each.instance:
            what = f"is the port of {other} and of {each.instance}: only one of them can run"
            yield Finding("port-shared", where, what, _another_port(paths, each), instance=each.instance)
        elif each.is_own:
            continue
        elif each.verdict == "held":
            yield Finding("port-taken", where, f"of {each.instance} is held by {_holder(each)}", _free_it(paths, each), instance=each.instance)
        elif each.verdict == "unavailable":
            yield Finding("address-missing", where, f"of {each.instance}: this machine has no such address", _setting(paths, each.instance, "{host: 127.0.0.1}"), "or the one that is meant: ip address", each.instance)
        elif each.verdict == "not_permitted" or (each.port < host.unprivileged_port and paths.scope == "system"):
            yield Finding("port-privileged", where, f"of {each.instance}: ports below {host.unprivileged_port} are not for the service's account", _another_port(paths, each), instance=each.instance)


def _holder(each: PortFacts) -> str:
    pids = ", ".join(map(str, each.pids[:4]))
    who = each.unit or (f"process {pids}" if pids else "a process that cannot be seen")
    return who + (f" ({each.comm})" if each.comm else "")


def _free_it(paths: Paths, each: PortFacts) -> str:
    """The other one is ended where it is a unit or a process of no unit; the other's session never."""
    if each.unit.endswith(".service") and not each.unit.startswith(("user@", "vllmd@")):
        return command("systemctl", "stop", each.unit)
    if each.pids and not each.unit.startswith("vllmd@"):
        return command("kill", *map(str, each.pids))
    return _another_port(paths, each)


def _another_port(paths: Paths, each: PortFacts) -> str:
    return _setting(paths, each.instance, f"{{port: {each.free}}}") if each.free else ""


def _setting(paths: Paths, instance: str, serve: str) -> str:
    return _written(paths, instance, "90-doctor-serve.yaml", f"serve: {serve}")


def _written(paths: Paths, instance: str, name: str, line: str) -> str:
    folder = paths.config / f"{instance}.d"
    return f"mkdir -p -m 0755 {command(str(folder))} && printf '%s\\n' {command(line)} >{command(str(folder / name))}"


def sources(found: Sequence[SourceFacts], instances: Sequence[InstanceFacts], paths: Paths, *, has_credentials: bool = True) -> Iterator[Finding | Unseen]:
    """`has_credentials`: those of the unit were sent; else nothing is said of them."""
    here = {each.name for each in instances if each.is_here}
    for each in found:
        failure = each.failure
        if failure is None:
            continue
        credential = _credential(each, failure)
        if credential is not None and not has_credentials:
            yield Unseen(f"whether {each.source} takes the credentials of {each.instance}", "they are root's")
            continue
        finding = credential or Finding("source-unreachable", each.source, failure.what, _offline(paths, each.instance), _way(failure), each.instance)
        if each.instance in here:  # what is here is served all the same
            finding = Finding(finding.check, finding.where, finding.what, finding.mend, finding.note, finding.instance, "warning", finding.asks)
        yield finding
    offered = {each.instance for each in found if each.outcome in ("offered", "failed")}
    for each in found:
        if each.outcome == "not_found" and each.instance not in here | offered:
            yield Finding("model-nowhere", f"instance {each.instance}", f"{each.source} has not got its model: {each.reason}", instance=each.instance)


def _way(failure: Failure) -> str:
    return f"if this host is to have no network; else: {failure.hint}" if failure.hint else "if this host is to have no network"


def _offline(paths: Paths, instance: str) -> str:
    return _written(paths, instance, "90-doctor-offline.yaml", "model: {offline: true}")


def _credential(each: SourceFacts, failure: Failure) -> Finding | None:
    kind = "hf-token" if failure.code in _TOKEN_CODES else "s3-credentials" if failure.code in _S3_CODES else ""
    if not kind:
        return None
    asks = "a new token" if kind == "hf-token" else "the credentials, in the format of ~/.aws/credentials"
    mend = f"install -d -m 0700 {_STORE} && install -m 0600 /dev/stdin {_STORE}/vllmd.{kind}"
    return Finding("credential-refused", each.source, failure.what, mend, failure.hint, each.instance, asks=asks)


def inside(facts: InsideFacts, user: str) -> Iterator[Finding]:
    where = f"inside vllmd@{facts.instance}.service"
    for device, number in facts.devices.items():
        if number in (errno.EACCES, errno.EPERM):
            yield _device(facts, device, number, user)
        elif number in (errno.ENXIO, errno.ENODEV):
            yield Finding("device-dead", device, f"{where}: {os.strerror(number)}: no driver stands behind it", "nvidia-modprobe -c 0 -u" if "nvidia" in device else "", "is the driver loaded? lsmod", facts.instance)
    for path, number in facts.readable.items():
        if number == errno.EACCES:
            yield Finding("file-unreadable", path, f"{where}: user {user} may not read it", f"{command('chgrp', user, path)} && {command('chmod', 'g+r', path)}", f"and its directories: namei -l {path}", facts.instance)
        elif number == errno.ENOENT:
            yield Finding("file-missing", path, f"{where}: it is not there, although it is outside", "", "a setting of the unit hides it: systemctl cat", facts.instance)
    for path, number in facts.writable.items():
        if number:
            yield Finding("directory-unwritable", path, f"{where}: user {user} may not write there ({os.strerror(number)})", _let_write(facts, path, user), "a directory of your own also needs ReadWritePaths= in a drop-in", facts.instance)
    if facts.is_delegated is False:
        yield Finding("cgroup-undelegated", facts.cgroup or where, "the unit's control group cannot be divided: processes of an engine cannot be ended for certain", note="systemctl show -p Delegate, and the line about Delegate= if there is one above", instance=facts.instance)


def _let_write(facts: InsideFacts, path: str, user: str) -> str:
    folder = f"/etc/systemd/system/vllmd@{facts.instance}.service.d"
    line = command(f"ReadWritePaths={path}")
    return f"{command('chown', '-h', f'{user}:{user}', path)} && mkdir -p {folder} && printf '[Service]\\n%s\\n' {line} >>{folder}/90-vllmd-doctor.conf && systemctl daemon-reload"


def _device(facts: InsideFacts, device: str, number: int, user: str) -> Finding:
    where = f"inside vllmd@{facts.instance}.service"
    if number == errno.EPERM:  # not the mode of the file: the unit's list of devices
        folder = "/etc/systemd/system/vllmd@.service.d"
        mend = f"mkdir -p {folder} && printf '[Service]\\n%s\\n' {command(f'DeviceAllow={device} rw')} >>{folder}/90-vllmd-doctor.conf && systemctl daemon-reload"
        return Finding("device-refused", device, f"{where}: the unit's DeviceAllow= does not let it in", mend, instance=facts.instance)
    _, gid, mode, group = facts.owners.get(device, (0, 0, 0, ""))
    if gid and mode & 0o060 == 0o060:
        mend, note = command("usermod", "-aG", group, user), f"group {group} may use it, and user {user} is not in it"
    else:
        mend, note = command("chmod", "0666", device), "to last over a reboot: NVreg_DeviceFileMode of the module nvidia, or a udev rule"
    return Finding("device-permission", device, f"{where}: user {user} may not open it (mode {mode:04o})", mend, note, facts.instance)
