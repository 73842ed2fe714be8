"""The signals of the low-latency pair: in the formal model nothing goes wrong, and what is left out of it does."""

from __future__ import annotations

from collections.abc import Callable

import protocol_model
import pytest
from protocol_model import BACK, OVERWRITTEN, STALE, STUCK, TOO_MANY, Action, Outcome, Rules, program, search

EXCHANGES = 6  # of each kind


THE_PROTOCOL = Rules()


def dispatches(*parts: tuple[str, int]) -> list[Action]:
    return [Action(part, "dispatch", n) for part, n in parts]


def combines(*parts: tuple[str, int]) -> list[Action]:
    return [Action(part, "combine", n) for part, n in parts]


def one_at_a_time(exchanges: int = EXCHANGES) -> list[Action]:
    return [a for n in range(1, exchanges + 1) for a in dispatches(("send", n), ("recv", n))]


def two_in_flight(exchanges: int = EXCHANGES) -> list[Action]:
    pairs = [(n, n + 1) for n in range(1, exchanges, 2)]
    return [a for n, m in pairs for a in dispatches(("send", n), ("send", m), ("recv", n), ("recv", m))]


def staggered(exchanges: int = EXCHANGES) -> list[Action]:
    between = [a for n in range(2, exchanges + 1) for a in dispatches(("send", n), ("recv", n - 1))]
    return [*dispatches(("send", 1)), *between, *dispatches(("recv", exchanges))]


def decode() -> list[Action]:
    actions = []
    for n in range(1, EXCHANGES + 1):
        actions += dispatches(("send", n), ("recv", n))
        actions += combines(("send", n), ("recv", n))
    return actions


def decode_two_microbatches() -> list[Action]:
    """Each computes while the rows of the other are on their way."""
    actions = []
    for n, m in [(n, n + 1) for n in range(1, EXCHANGES, 2)]:
        actions += dispatches(("send", n), ("send", m), ("recv", n))
        actions += combines(("send", n))
        actions += dispatches(("recv", m))
        actions += combines(("send", m), ("recv", n), ("recv", m))
    return actions


def out_of_order(exchanges: int = EXCHANGES) -> list[Action]:
    """As two in flight, but the second is received first."""
    pairs = [(n, n + 1) for n in range(1, exchanges, 2)]
    return [a for n, m in pairs for a in dispatches(("send", n), ("send", m), ("recv", m), ("recv", n))]


def received_again() -> list[Action]:
    """One at a time, and each once more while the next is on its way."""
    again = [a for n in range(2, EXCHANGES + 1) for a in dispatches(("send", n), ("recv", n - 1), ("recv", n))]
    return [*dispatches(("send", 1), ("recv", 1)), *again]


def three_sends() -> list[Action]:
    return dispatches(*[(part, n) for part in ("send", "recv") for n in (1, 2, 3)])


def outcome(actions: list[list[Action]], rules: Rules = THE_PROTOCOL, follow_arrivals: bool = False) -> Outcome:
    """`actions`: of each rank."""
    programs = [program(rank, len(actions), own, rules) for rank, own in enumerate(actions)]
    return search(programs, follow_arrivals)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "shape", [one_at_a_time, two_in_flight, staggered, decode, decode_two_microbatches], ids=lambda f: f.__name__
)
def test_nothing_goes_wrong(shape: Callable[[], list[Action]], world_size: int) -> None:
    found = outcome([shape()] * world_size)
    assert not found.broken, found
    assert found.states > EXCHANGES


MUTATIONS = {
    "no credit": (Rules(credit=None), {OVERWRITTEN, TOO_MANY}),
    "credit of n - 1": (Rules(credit=1), {STUCK}),
    "credit of n - 3": (Rules(credit=3), {OVERWRITTEN, TOO_MANY}),
    "credit of n - 3, with room for it": (Rules(credit=3, halves=3), {TOO_MANY}),
    "one half": (Rules(halves=1), {OVERWRITTEN}),
    "epoch not released after its header": (Rules(epoch_released=False), {STALE}),
    "flag not released after its row": (Rules(flag_released=False), {STALE}),
    "done before the last read": (Rules(done_last=False), {OVERWRITTEN}),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [two_in_flight, staggered], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(mutation: str, shape: Callable[[], list[Action]], world_size: int) -> None:
    rules, broken = MUTATIONS[mutation]
    found = outcome([shape()] * world_size, rules)
    assert found.broken.keys() == broken, found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [out_of_order, received_again], ids=lambda f: f.__name__)
def test_recvs_in_another_order_than_sends_lose_rows(shape: Callable[[], list[Action]], world_size: int) -> None:
    found = outcome([shape()] * world_size)
    assert {BACK, OVERWRITTEN} <= found.broken.keys(), found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_three_sends_without_a_recv_end_in_a_wait(world_size: int) -> None:
    """Which a time-out ends: nothing was damaged."""
    found = outcome([three_sends()] * world_size)
    assert found.broken.keys() == {STUCK}, found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_three_sends_of_one_rank_alone_need_its_own_credit(world_size: int) -> None:
    """Its peers give it theirs for the third, which would take the place of the first in its own memory."""
    actions = [three_sends(), *[staggered()] * (world_size - 1)]
    found = outcome(actions)
    assert found.broken.keys() == {STUCK}, found
    found = outcome(actions, Rules(own_credit=False, exact=False))
    assert STALE in found.broken, found


SMALL = {
    # A credit of n - 3 is none, in three exchanges.
    **{name: ([staggered(3)] * 2, rules) for name, (rules, _) in MUTATIONS.items() if rules.credit != 3},
    "the protocol": ([staggered(3)] * 2, THE_PROTOCOL),
    "out of order": ([[*out_of_order(2), *dispatches(("send", 3), ("recv", 3))]] * 2, THE_PROTOCOL),
    "three sends": ([three_sends()] * 2, THE_PROTOCOL),
    "three sends of one rank": ([three_sends(), staggered(3)], THE_PROTOCOL),
    "three sends of one rank, without its credit": (
        [three_sends(), staggered(3)],
        Rules(own_credit=False, exact=False),
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_search_without_arrivals_finds_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the search by the definition, where that has few enough states: with one row, from rank 0 to rank 1."""
    monkeypatch.setattr(protocol_model, "num_rows", lambda source, reader, n: int(source < reader))
    actions, rules = SMALL[case]
    quick, full = outcome(actions, rules), outcome(actions, rules, follow_arrivals=True)
    assert quick.broken.keys() == full.broken.keys(), f"{quick}\n{full}"
    assert quick.states < full.states


def test_a_run_that_breaks_something_is_told_step_by_step() -> None:
    found = outcome([two_in_flight(2)] * 2, Rules(credit=1))
    told = """4 states
stuck:
    rank 0: await >= 0: dispatch done from ranks [0, 1]
    rank 0: write 1: dispatch header[1] into ranks [0, 1]
"""
    assert str(found).startswith(told), found
    last = """
    rank 0 waits: await >= 1: dispatch done from ranks [0, 1]
    rank 1 waits: await >= 1: dispatch done from ranks [0, 1]"""
    assert str(found).endswith(last), found
