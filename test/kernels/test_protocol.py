"""The signals of the nvlink kernels: in the formal model nothing goes wrong, and what is left out of it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kernels import protocol_model
from kernels.protocol_model import (
    BACK,
    KINDS,
    OPS,
    OVERWRITTEN,
    STALE,
    STUCK,
    TOO_MANY,
    Exchange,
    Kernel,
    Outcome,
    Rules,
    program,
    search,
)

EXCHANGES = 6  # of each kind

THE_PROTOCOL = Rules()


def sends(kind: str, *numbers: int) -> list[Kernel]:
    return [Kernel(kind, n, ("send",)) for n in numbers]


def recvs(kind: str, *numbers: int) -> list[Kernel]:
    return [Kernel(kind, n, ("recv",)) for n in numbers]


def whole(exchanges: int = EXCHANGES, kind: str = "dispatch") -> list[Kernel]:
    return [Kernel(kind, n) for n in range(1, exchanges + 1)]


def in_halves(exchanges: int = EXCHANGES, kind: str = "dispatch") -> list[Kernel]:
    return [k for n in range(1, exchanges + 1) for k in [*sends(kind, n), *recvs(kind, n)]]


def two_in_flight(exchanges: int = EXCHANGES, kind: str = "dispatch") -> list[Kernel]:
    return [k for n in range(1, exchanges, 2) for k in [*sends(kind, n, n + 1), *recvs(kind, n, n + 1)]]


def staggered(exchanges: int = EXCHANGES, kind: str = "dispatch") -> list[Kernel]:
    between = [k for n in range(2, exchanges + 1) for k in [*sends(kind, n), *recvs(kind, n - 1)]]
    return [*sends(kind, 1), *between, *recvs(kind, exchanges)]


def whole_and_staggered() -> list[Kernel]:
    """Operators of either form, one after another."""
    halves = [*sends("dispatch", 3, 4), *recvs("dispatch", 3), *sends("dispatch", 5), *recvs("dispatch", 4, 5)]
    return [*whole(2), *halves, Kernel("dispatch", EXCHANGES)]


def decode() -> list[Kernel]:
    return [Kernel(kind, n) for n in range(1, EXCHANGES + 1) for kind in KINDS]


def decode_two_microbatches() -> list[Kernel]:
    """Each computes while the rows of the other are on their way."""
    kernels = []
    for n, m in [(n, n + 1) for n in range(1, EXCHANGES, 2)]:
        kernels += [*sends("dispatch", n, m), *recvs("dispatch", n), *sends("combine", n)]
        kernels += [*recvs("dispatch", m), *sends("combine", m), *recvs("combine", n, m)]
    return kernels


def combined_early() -> list[Kernel]:
    """Two dispatches in flight; the first one's rows go back before the third leaves."""
    kernels = sends("dispatch", 1)
    for n in range(1, EXCHANGES):
        kernels += [*sends("dispatch", n + 1), *recvs("dispatch", n), Kernel("combine", n)]
    return [*kernels, *recvs("dispatch", EXCHANGES), Kernel("combine", EXCHANGES)]


def combined_late() -> list[Kernel]:
    """The third leaves before that: combines in another place among dispatches than in `combined_early`."""
    kernels = sends("dispatch", 1, 2)
    for n in range(1, EXCHANGES - 1):
        kernels += [*recvs("dispatch", n), *sends("dispatch", n + 2), Kernel("combine", n)]
    for n in (EXCHANGES - 1, EXCHANGES):
        kernels += [*recvs("dispatch", n), Kernel("combine", n)]
    return kernels


def out_of_order(exchanges: int = EXCHANGES) -> list[Kernel]:
    """As two in flight, but the second is received first."""
    pairs = [(n, n + 1) for n in range(1, exchanges, 2)]
    return [k for n, m in pairs for k in [*sends("dispatch", n, m), *recvs("dispatch", m, n)]]


def received_again() -> list[Kernel]:
    """One at a time, and each once more while the next is on its way."""
    again = [k for n in range(2, EXCHANGES + 1) for k in [*sends("dispatch", n), *recvs("dispatch", n - 1, n)]]
    return [Kernel("dispatch", 1), *again]


def three_sends() -> list[Kernel]:
    return [*sends("dispatch", 1, 2, 3), *recvs("dispatch", 1, 2, 3)]


def outcome(
    kernels: Sequence[Sequence[Kernel | Exchange]], rules: Rules = THE_PROTOCOL, follow_arrivals: bool = False
) -> Outcome:
    """`kernels`: of each rank."""
    programs = [program(rank, len(kernels), own, rules) for rank, own in enumerate(kernels)]
    return search(programs, follow_arrivals)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [whole, in_halves, two_in_flight, staggered], ids=lambda f: f.__name__)
def test_nothing_goes_wrong_with_one_kind_alone(
    shape: Callable[[int, str], list[Kernel]], kind: str, world_size: int
) -> None:
    found = outcome([shape(EXCHANGES, kind)] * world_size)
    assert not found.broken, found
    assert found.states > EXCHANGES


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shape", [whole_and_staggered, decode, decode_two_microbatches], ids=lambda f: f.__name__)
def test_nothing_goes_wrong(shape: Callable[[], list[Kernel]], world_size: int) -> None:
    found = outcome([shape()] * world_size)
    assert not found.broken, found
    assert found.states > EXCHANGES


UNEVEN = {
    "one kind": [whole(), staggered(), two_in_flight()],
    "both kinds": [combined_early(), combined_late(), combined_early()],
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shapes", UNEVEN)
def test_nothing_goes_wrong_if_ranks_have_programs_of_their_own(shapes: str, world_size: int) -> None:
    found = outcome(UNEVEN[shapes][:world_size])
    assert not found.broken, found


MUTATIONS = {
    "no credit": (Rules(credit=None), {OVERWRITTEN, TOO_MANY}),
    "credit of n - 1": (Rules(credit=1), {STUCK}),
    "credit of n - 3": (Rules(credit=3), {OVERWRITTEN, TOO_MANY}),
    "credit of n - 3, with room for it": (Rules(credit=3, halves=3), {TOO_MANY}),
    "one half": (Rules(halves=1), {OVERWRITTEN}),
    "credits ahead": (Rules(credits_ahead=True), {OVERWRITTEN, TOO_MANY}),
    "credits before the last read": (Rules(credits_early=True), {OVERWRITTEN, TOO_MANY}),
    "announced beside the words": (Rules(self_validating=False), {STALE}),
    "flag not released after its row": (Rules(flag_released=False), {STALE}),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [two_in_flight, staggered], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(mutation: str, shape: Callable[[], list[Kernel]], world_size: int) -> None:
    rules, broken = MUTATIONS[mutation]
    found = outcome([shape()] * world_size, rules)
    assert found.broken.keys() == broken, found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [two_in_flight, staggered], ids=lambda f: f.__name__)
def test_who_enters_waits_for_credits_first(shape: Callable[[int, str], list[Kernel]], world_size: int) -> None:
    found = outcome([shape(EXCHANGES, "combine")] * world_size, Rules(entered_early=True))
    assert found.broken.keys() == {OVERWRITTEN, TOO_MANY}, found


@pytest.mark.parametrize("world_size", [2, 3])
def test_credits_given_after_the_wait_for_those_of_others_come_too_late(world_size: int) -> None:
    """Where no kernel lies between a receive and the send that needs it of the peers."""
    found = outcome([staggered()] * world_size, Rules(credits_first=False))
    assert found.broken.keys() == {STUCK}, found


@pytest.mark.parametrize("world_size", [2, 3])
def test_kernels_of_the_other_kind_give_credits_too(world_size: int) -> None:
    """Else a rank that combines before it sends again would keep a credit from one that sends before it combines."""
    found = outcome(UNEVEN["both kinds"][:world_size], Rules(credits_of_both_kinds=False))
    assert found.broken.keys() == {STUCK}, found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [out_of_order, received_again], ids=lambda f: f.__name__)
def test_recvs_in_another_order_than_sends_lose_rows(shape: Callable[[], list[Kernel]], world_size: int) -> None:
    found = outcome([shape()] * world_size)
    assert {BACK, OVERWRITTEN} <= found.broken.keys(), found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_three_sends_without_a_recv_end_in_a_wait(world_size: int) -> None:
    """Which a timeout ends: nothing was damaged."""
    found = outcome([three_sends()] * world_size)
    assert found.broken.keys() == {STUCK}, found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_three_sends_of_one_rank_alone_need_its_own_credit(world_size: int) -> None:
    """Its peers give it theirs for the third, which would take the place of the first in its own memory."""
    kernels = [three_sends(), *[staggered()] * (world_size - 1)]
    found = outcome(kernels)
    assert found.broken.keys() == {STUCK}, found
    found = outcome(kernels, Rules(own_credit=False, exact=False))
    assert STALE in found.broken, found


# --- plan, dispatch and combine ---


def exchanges(*ops: str) -> list[Exchange]:
    return [Exchange(op, n) for n, op in enumerate(ops, 1)]


def layers(count: int = 2) -> list[Exchange]:
    return exchanges(*OPS * count)


def one_op(op: str = "dispatch", count: int = EXCHANGES - 1) -> list[Exchange]:
    return exchanges(*[op] * count)


def cached_plan() -> list[Exchange]:
    return exchanges("plan", "dispatch", "combine", "dispatch", "dispatch", "combine")


def both_pairs() -> list[Kernel | Exchange]:
    """Between the halves of the low-latency pair too."""
    return [
        *sends("dispatch", 1), Exchange("plan", 1), *sends("dispatch", 2), Exchange("dispatch", 2),
        *recvs("dispatch", 1), Exchange("combine", 3), *sends("dispatch", 3), Exchange("dispatch", 4),
        *recvs("dispatch", 2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [layers, one_op, cached_plan, both_pairs], ids=lambda f: f.__name__)
def test_nothing_goes_wrong_with_exchanges(shape: Callable[[], list[Kernel | Exchange]], world_size: int) -> None:
    found = outcome([shape()] * world_size)
    assert not found.broken, found
    assert found.states > EXCHANGES


EXCHANGE_MUTATIONS = {
    "no credit": (Rules(last_use=False), {OVERWRITTEN}),
    "one header": (Rules(headers=1), {OVERWRITTEN}),
    "no handshake": (Rules(handshake=False), {TOO_MANY}),
    "done before the last read": (Rules(done_last=False), {OVERWRITTEN}),
    "flag not released after its row": (Rules(flag_released=False), {STALE}),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("mutation", EXCHANGE_MUTATIONS)
def test_a_mutation_of_exchanges_is_found(mutation: str, world_size: int) -> None:
    rules, broken = EXCHANGE_MUTATIONS[mutation]
    # Of one operator, credits alone keep ranks together.
    found = outcome([layers() if mutation == "no handshake" else one_op()] * world_size, rules)
    assert found.broken.keys() == broken, found


TO_THE_THIRD_SEND = [combined_late()[:5], combined_early()[:5]]

SMALL = {
    # A credit of n - 3 is none, in three exchanges.
    **{name: ([staggered(3)] * 2, rules) for name, (rules, _) in MUTATIONS.items() if rules.credit != 3},
    "the protocol": ([staggered(3)] * 2, THE_PROTOCOL),
    "combine": ([staggered(3, "combine")] * 2, THE_PROTOCOL),
    "entered early": ([staggered(3, "combine")] * 2, Rules(entered_early=True)),
    "credits too late": ([staggered(3)] * 2, Rules(credits_first=False)),
    "both kinds": (TO_THE_THIRD_SEND, THE_PROTOCOL),
    "credits of one kind": (TO_THE_THIRD_SEND, Rules(credits_of_both_kinds=False)),
    "out of order": ([[*out_of_order(2), Kernel("dispatch", 3)]] * 2, THE_PROTOCOL),
    "three sends": ([three_sends()] * 2, THE_PROTOCOL),
    "exchanges": ([one_op(count=3)] * 2, THE_PROTOCOL),
    **{f"exchanges: {name}": ([one_op(count=3)] * 2, rules) for name, (rules, _) in EXCHANGE_MUTATIONS.items()},
    "three sends of one rank": ([three_sends(), staggered(3)], THE_PROTOCOL),
    "three sends of one rank, without its credit": (
        [three_sends(), staggered(3)],
        Rules(own_credit=False, exact=False),
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_search_without_arrivals_finds_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the search by the definition, where that has few enough states: with one row, from rank 0 to rank 1, and
    announcements of one word."""
    monkeypatch.setattr(protocol_model, "num_rows", lambda source, reader, n: int(source < reader))
    monkeypatch.setattr(protocol_model, "ANNOUNCED", 1)
    kernels, rules = SMALL[case]
    quick, full = outcome(kernels, rules), outcome(kernels, rules, follow_arrivals=True)
    assert quick.broken.keys() == full.broken.keys(), f"{quick}\n{full}"
    assert quick.states < full.states


def test_a_run_that_breaks_a_promise_is_printed_step_by_step() -> None:
    found = outcome([two_in_flight(2)] * 2, Rules(credit=1))
    told = """9 states
stuck:
    rank 0: await >= 0: dispatch received from ranks [0]
    rank 0: await >= 0: dispatch done from ranks [1]
    rank 0: write 1: dispatch announced[1][0] into ranks [0, 1]
"""
    assert str(found).startswith(told), found
    last = """
    rank 0 waits: await >= 1: dispatch received from ranks [0]
    rank 1 waits: await >= 1: dispatch received from ranks [1]"""
    assert str(found).endswith(last), found
