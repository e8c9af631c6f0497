"""Whose port it is, and who may be ended: the table of claims and policies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllmd.preflight.attribution import Claim
from vllmd.preflight.claims import Judgement, LaunchRecord, Me, Own, Policy, Standalone, Stray, judge
from vllmd.preflight.owner import OwnerRules, ProcessFacts
from vllmd.preflight.report import Listener

pytestmark = pytest.mark.unit

ME = Me(uid=1000, boot_id="boot", untouchable=frozenset({1, 50, 100}))
UNIT = "/system.slice/vllm.service"
INSTANCE = "/system.slice/system-vllmd.slice/vllmd@other.service/engine-abc"
OWN = "/system.slice/system-vllmd.slice/vllmd@mine.service"
SESSION = "/user.slice/user-1000.slice/session-3.scope"
LAUNCH = LaunchRecord("abc", "boot", 700, 9, f"{OWN}/engine-abc", 1000)
EVERY: list[Policy] = [Standalone(), Standalone(other_uid=True), Own((LAUNCH,), OWN), Stray(Own((LAUNCH,), OWN))]


def vllm(pid: int = 700, cgroup: str = "", **more: object) -> ProcessFacts:
    facts = ProcessFacts(pid, ppid=50, uid=1000, start_time=3, comm="vllm", argv=("vllm", "serve", "m"), cgroup=cgroup)
    return replace(facts, **more)  # type: ignore[arg-type]


def other(pid: int = 800, cgroup: str = "", **more: object) -> ProcessFacts:
    return vllm(pid, cgroup, **{"comm": "nginx", "argv": ("nginx",), **more})


def claim(*holders: ProcessFacts, cgroup: str = "", unit: str = "", uid: int | None = 1000, neighbours: tuple[ProcessFacts, ...] = ()) -> Claim:
    name = unit or next((part for part in reversed(cgroup.split("/")) if part.endswith((".service", ".scope"))), "")
    listener = Listener("127.0.0.1", 8000, 5, uid, tuple(each.pid for each in holders), cgroup, name)
    return Claim(listener, holders, neighbours)


def ruled(policy: Policy, *claims: Claim, rules: OwnerRules | None = None) -> tuple[int, str, tuple[int, ...]]:
    found: Judgement = judge(claims, rules or OwnerRules(), ME, policy)
    return found.ruling.code, found.ruling.reason, tuple(each.pid for each in found.roots)


STOP = (0, "", (700,))
FOREIGN = (2, "port_owned_by_other_process", ())


def test_no_claim_is_free_under_every_policy() -> None:
    assert [ruled(policy) for policy in EVERY] == [(0, "", ())] * 4


def test_the_standalone_command_ends_a_vllm_wherever_it_runs_but_in_an_instance() -> None:
    for cgroup in ("", "/", SESSION, UNIT):
        assert ruled(Standalone(), claim(vllm(cgroup=cgroup), cgroup=cgroup)) == STOP
    assert ruled(Standalone(), claim(vllm(cgroup=INSTANCE), cgroup=INSTANCE)) == (2, "owned_by_instance", ())


def test_run_never_ends_another_units_vllm() -> None:
    for policy in EVERY[2:]:
        for cgroup in (UNIT, INSTANCE, "/system.slice/docker-0815.scope"):
            assert ruled(policy, claim(vllm(cgroup=cgroup), cgroup=cgroup))[0] == 2


def test_run_ends_a_stray_in_no_unit_only_if_told_so() -> None:
    for cgroup in ("", "/", SESSION):
        assert ruled(EVERY[2], claim(vllm(cgroup=cgroup), cgroup=cgroup)) == FOREIGN
        assert ruled(EVERY[3], claim(vllm(cgroup=cgroup), cgroup=cgroup)) == STOP


def test_run_ends_its_own_leftovers_by_every_mark() -> None:
    marks = [
        vllm(700, start_time=9),
        vllm(701, launch_id="abc"),
        vllm(702, cgroup=LAUNCH.cgroup),
        other(703, launch_id="abc"),
        vllm(704, cgroup=f"{OWN}/engine-of-an-earlier-launch"),
    ]
    for each in marks:
        assert ruled(EVERY[2], claim(each, cgroup=each.cgroup)) == (0, "", (each.pid,))


def test_a_mark_of_another_boot_user_or_time_is_none() -> None:
    former = Own((replace(LAUNCH, boot_id="former", cgroup=""),))
    assert ruled(former, claim(vllm(700, start_time=9, launch_id="abc"))) == FOREIGN
    own = Own((LAUNCH,))
    assert ruled(own, claim(vllm(700, start_time=8))) == FOREIGN
    assert ruled(own, claim(vllm(700, start_time=9, uid=33), uid=33))[0] == 3


def test_a_launch_that_had_no_cgroup_of_its_own_does_not_claim_the_one_it_sat_in() -> None:
    own = Own((replace(LAUNCH, cgroup="/"),), cgroup="/")
    assert ruled(own, claim(vllm(701, cgroup="/"), cgroup="/")) == FOREIGN
    own = Own((replace(LAUNCH, cgroup=SESSION),))
    assert ruled(own, claim(vllm(701, cgroup=SESSION), cgroup=SESSION)) == FOREIGN


def test_a_stranger_is_2_for_everyone_even_where_others_may_be_ended() -> None:
    for policy in EVERY:
        assert ruled(policy, claim(other())) == FOREIGN
        assert ruled(policy, claim(other(uid=33), uid=33)) == FOREIGN


def test_mixed_listeners_are_2_and_nothing_is_ended() -> None:
    assert ruled(Standalone(), claim(vllm()), claim(other())) == FOREIGN
    assert ruled(Standalone(), claim(vllm()), claim(vllm(701, uid=33), uid=33), claim(uid=None)) == (3, "port_owned_by_other_uid", ())


def test_another_users_vllm_is_3_unless_the_command_may_end_it() -> None:
    for policy in (EVERY[0], EVERY[2], EVERY[3]):
        assert ruled(policy, claim(vllm(uid=33), uid=33)) == (3, "port_owned_by_other_uid", ())
    assert ruled(EVERY[1], claim(vllm(uid=33), uid=33)) == STOP


def test_an_unseen_listener_of_another_user_is_told_by_its_cgroup() -> None:
    for policy in EVERY:
        assert ruled(policy, claim(uid=33, cgroup="/a", neighbours=(vllm(uid=33),)))[0] == 3
        assert ruled(policy, claim(uid=33, cgroup="/a", neighbours=(other(uid=33),)))[0] == 2
        assert ruled(policy, claim(uid=33, cgroup=UNIT))[0] == 2
        assert ruled(policy, claim(uid=33, cgroup="/a"))[0] == 4
        assert ruled(policy, claim(uid=None))[0] == 4


def test_an_unseen_listener_of_our_own_user_is_never_ended_by_guess() -> None:
    assert ruled(Standalone(), claim(uid=1000, cgroup=SESSION + "x", neighbours=(vllm(),)))[0] == 4


@pytest.mark.parametrize("pid", [50, 100])
def test_the_caller_and_its_ancestors_are_never_ended(pid: int) -> None:
    for policy in EVERY:
        assert ruled(policy, claim(vllm(pid, launch_id="abc")), rules=OwnerRules(regex="."))[0] == 2


def test_a_socket_that_a_stranger_passed_to_a_vllm_is_the_strangers() -> None:
    assert ruled(Standalone(), claim(other(600), vllm(700, ppid=600))) == FOREIGN


def test_a_socket_that_a_vllm_passed_to_its_children_is_the_vllms() -> None:
    assert ruled(Standalone(), claim(vllm(700), other(701, ppid=700), other(702, ppid=701))) == STOP


def test_socket_activation_is_named_and_systemd_never_ended() -> None:
    by_systemd = claim(other(1, comm="systemd", uid=0), vllm(700), uid=0)
    unseen = claim(uid=0, cgroup="/init.scope", unit="init.scope")
    for each in (by_systemd, unseen):
        found = judge([each], OwnerRules(regex="."), ME, Standalone(other_uid=True))
        assert (found.ruling.code, found.ruling.reason) == (2, "systemd_socket_activation")
        assert "list-sockets" in found.ruling.hint


@pytest.mark.parametrize(
    ("cgroup", "hint"),
    [
        (UNIT, "systemctl stop vllm.service"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/web.service", "systemctl --user stop web.service"),
        (SESSION, "End that process"),
        ("", "End that process"),
    ],
)
def test_the_hint_names_the_command_that_frees_the_port(cgroup: str, hint: str) -> None:
    found = judge([claim(other(cgroup=cgroup), cgroup=cgroup)], OwnerRules(), ME, Own())
    assert hint in found.ruling.hint


def test_a_process_that_names_itself_with_control_characters_writes_none_into_the_error() -> None:
    found = judge([claim(other(comm="x\x1b[2J\ny"))], OwnerRules(), ME, Standalone())
    assert found.ruling.error.isprintable()
