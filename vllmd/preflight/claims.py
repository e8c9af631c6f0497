"""May the holders of a port be stopped? The rules, pure: claims in, one judgement out.

`vllm-preflight` (Standalone) stops any vLLM of its user, but never an instance of vllmd. `vllmd run` (Own) ends only
what is left of its own instance, since otherwise two instances on one port would kill each other for ever; with Stray
also a vLLM of its user that runs in no unit. Whatever the policy, one strange listener means that nothing is stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllmd.preflight.attribution import Claim
from vllmd.preflight.owner import OwnerRules, ProcessFacts, is_engine
from vllmd.system.cgroupnames import is_instance, is_login, is_user_unit


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """launch.json: which life of the engine may have left something behind. Ours only in the same boot."""

    launch_id: str
    boot_id: str
    pid: int
    start_time: int
    cgroup: str
    uid: int


@dataclass(frozen=True, slots=True)
class Standalone:
    """`vllm-preflight`."""

    other_uid: bool = False


@dataclass(frozen=True, slots=True)
class Own:
    """`vllmd run` with preflight.reclaim: own. `launches` are the instance's own recorded ones, `cgroup` the unit's
    delegated cgroup ('' none): whatever else is in there is a leftover too."""

    launches: tuple[LaunchRecord, ...] = ()
    cgroup: str = ""


@dataclass(frozen=True, slots=True)
class Stray:
    """`vllmd run` with preflight.reclaim: stray."""

    own: Own


Policy = Standalone | Own | Stray


@dataclass(frozen=True, slots=True)
class Me:
    """Who asks: the effective user, the current boot, and the processes that are never ended (self, ancestors)."""

    uid: int
    boot_id: str
    untouchable: frozenset[int]


@dataclass(frozen=True, slots=True)
class Ruling:
    """On one claim. `code` 0: `roots`, of its holders, may be stopped; else the exit status and why."""

    code: int
    reason: str = ""
    error: str = ""
    hint: str = ""
    roots: tuple[ProcessFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """On all claims: the worst ruling, or `roots`, the holders to stop."""

    ruling: Ruling
    roots: tuple[ProcessFacts, ...] = ()


def judge(claims: Iterable[Claim], rules: OwnerRules, me: Me, policy: Policy) -> Judgement:
    """A foreign listener (2) outweighs another user's (3), that an unattributable one (4)."""
    rulings = [_rule(each, rules, me, policy) for each in claims]
    refused = sorted((each for each in rulings if each.code), key=lambda each: each.code)
    if refused:
        return Judgement(refused[0])
    roots = {root.pid: root for each in rulings for root in each.roots}
    return Judgement(Ruling(0), tuple(roots.values()))


def _rule(claim: Claim, rules: OwnerRules, me: Me, policy: Policy) -> Ruling:
    own = policy.own if isinstance(policy, Stray) else policy
    if isinstance(own, Own) and _belongs(claim, own, me):
        return _stop(claim, claim.holders, me)
    if is_instance(claim.listener.cgroup):
        return _foreign(claim, "owned_by_instance", "an instance of vllmd, which only its own unit may stop")
    if _is_systemd(claim):
        return _foreign(claim, "systemd_socket_activation", "systemd itself (socket activation)")
    if not claim.holders:
        return _unseen(claim, rules, me)
    engines = [each for each in claim.holders if is_engine(each, rules)]
    if not engines or not _all_from(claim.holders, engines) or any(e.pid in me.untouchable for e in claim.holders):
        return _foreign(claim)
    return _engine(claim, engines, me, policy)


def _engine(claim: Claim, engines: list[ProcessFacts], me: Me, policy: Policy) -> Ruling:
    """The listener is a vLLM, of no instance that we know: whether we may stop it is the policy's."""
    other = [each for each in claim.holders if each.uid is not None and each.uid != me.uid]
    if other and not (isinstance(policy, Standalone) and policy.other_uid):
        return _other_user(claim)
    if isinstance(policy, Standalone):
        return _stop(claim, engines, me)
    loose = not claim.listener.unit or is_login(claim.listener.cgroup)
    if isinstance(policy, Stray) and loose:
        return _stop(claim, engines, me)
    if loose:
        return _foreign(claim, what="a vLLM that is not of this instance", hint=_end_it(claim))
    return _foreign(claim, what="another unit's vLLM")


def _stop(claim: Claim, engines: Iterable[ProcessFacts], me: Me) -> Ruling:
    roots = tuple(engines)
    if not roots or any(each.pid in me.untouchable for each in roots):
        return _foreign(claim)
    return Ruling(0, roots=roots)


def _unseen(claim: Claim, rules: OwnerRules, me: Me) -> Ruling:
    """No process of it can be seen: its cgroup, if anything, tells what it is."""
    uid = claim.listener.uid
    if uid is not None and uid != me.uid and any(is_engine(each, rules) for each in claim.neighbours):
        return _other_user(claim)
    if (claim.neighbours and uid != me.uid) or claim.listener.unit:
        return _foreign(claim)
    return Ruling(
        4,
        "listener_unattributable",
        f"{claim.listener} is held, and neither /proc nor a cgroup tells by whom{_user(uid)}",
        f"Find it as root: `ss -ltnp 'sport = :{claim.listener.port}'`.",
    )


def _foreign(claim: Claim, reason: str = "port_owned_by_other_process", what: str = "", hint: str = "") -> Ruling:
    who = what or "a process that is not a vLLM"
    error = f"{claim.listener} is {_verb(claim)} by {who}{_names(claim)}{_unit(claim)}"
    if reason == "systemd_socket_activation":
        hint = "Find the socket unit with `systemctl list-sockets --all`, and stop and disable it."
    return Ruling(2, reason, error, hint or _advice(claim))


def _other_user(claim: Claim) -> Ruling:
    uid = claim.listener.uid
    error = f"{claim.listener} is {_verb(claim)} by another user's vLLM{_user(uid)}{_names(claim)}{_unit(claim)}"
    hint = _advice(claim) if claim.listener.unit else "Ask that user to stop it, or set VLLM_ALLOW_KILL_OTHER_UID=1 as root."
    return Ruling(3, "port_owned_by_other_uid", error, hint)


def _belongs(claim: Claim, own: Own, me: Me) -> bool:
    if own.cgroup not in ("", "/") and _inside(claim.listener.cgroup, own.cgroup):
        return True
    return any(is_of(each, launch, me) for each in claim.holders for launch in own.launches)


def is_of(process: ProcessFacts, launch: LaunchRecord, me: Me) -> bool:
    """By pid with start time, by the launch id in its environment, or by the launch's own cgroup; in the same boot."""
    if launch.boot_id != me.boot_id or process.uid not in (None, launch.uid):
        return False
    same_process = process.pid == launch.pid and process.start_time == launch.start_time
    named = bool(launch.launch_id) and process.launch_id == launch.launch_id
    return same_process or named or (is_launch_cgroup(launch.cgroup) and _inside(process.cgroup, launch.cgroup))


def is_launch_cgroup(cgroup: str) -> bool:
    """Whether the cgroup was made for one launch, so that all in it may be ended. Without delegation a launch sits in
    somebody else's cgroup, the root one even."""
    return cgroup.rpartition("/")[2].startswith("engine-")


def _inside(cgroup: str, top: str) -> bool:
    return (cgroup + "/").startswith(top.rstrip("/") + "/")


def _all_from(holders: tuple[ProcessFacts, ...], engines: list[ProcessFacts]) -> bool:
    """Whether every holder is an engine or got the socket from one. One that passed it *to* a vLLM is a stranger."""
    family = {each.pid for each in engines}
    for _ in holders:
        family |= {each.pid for each in holders if each.ppid in family}
    return all(each.pid in family for each in holders)


def _is_systemd(claim: Claim) -> bool:
    if claim.holders:
        return any(each.comm == "systemd" or (each.pid == 1 and each.comm == "init") for each in claim.holders)
    return claim.listener.unit == "init.scope"


def _verb(claim: Claim) -> str:
    return {"listening": "held", "bound": "held (bound, not listening yet)"}.get(claim.listener.state, "held (connected)")


def _names(claim: Claim) -> str:
    shown = ", ".join(f"{each.pid} {_plain(each.comm)}" for each in claim.holders[:4])
    return f": {shown}" if shown else ""


def _unit(claim: Claim) -> str:
    return f", in {claim.listener.unit}" if claim.listener.unit else ""


def _plain(name: str) -> str:
    """A process may call itself whatever it likes, line breaks and terminal sequences included."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _user(uid: int | None) -> str:
    return "" if uid is None else f" (user {uid})"


def _advice(claim: Claim) -> str:
    unit = claim.listener.unit
    if unit and not is_login(claim.listener.cgroup) and unit != "init.scope":
        user = "--user " if is_user_unit(claim.listener.cgroup) else ""
        return f"`systemctl {user}stop {unit}` frees the port; or choose another with VLLM_PORT."
    return "End that process, or choose another port with VLLM_PORT."


def _end_it(claim: Claim) -> str:
    pids = " ".join(str(each.pid) for each in claim.holders)
    return f"End it (`kill {pids}`), or set `preflight: {{reclaim: stray}}`."
