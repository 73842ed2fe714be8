"""The signals of the nvlink kernels as a formal model, and a search through everything that may happen.

The protocol is what `program` says: a few kinds of steps on words of symmetric memory. Every rank has a word of a name
in every rank's memory, its own included: rank s writes, the rank p in whose memory it lies reads. Words hold the number
of the exchange that they were written in, which stands for the data too; at first they hold 0.

    write       into the memory of `ranks`. What one rank wrote arrives at each peer in any order, at any time, except
                that the writes of one word arrive in their order, and a write with `after` (a release) only when
                what was written before into the word `after` has arrived. A flag releases its own data and nothing
                else: less than a release of the PTX memory model does.
    await ==, await >=
                what `ranks` wrote here, before the rank goes on (an acquire)
    take ==, take >=
                the same of words that hold number and data: what is found and passes is what is read
    read        what `ranks` wrote here. That takes its time, which ends with the step.

The low-latency pair is `Kernel`: exchanges of two kinds, each in two halves of its memory, two in flight. `ep::plan`,
`ep::dispatch` and `ep::combine` are `Exchange`: counted together, one at a time, each in memory of its own.

Only arrivals are late. Awaits, takes and reads are over when the next step of their rank begins. `done` is published
after the reads, by the next kernel or at the end of the same one, and writes follow the acquire of their credit. A rank
sees at once what it writes into its own memory.

A program is what one rank does, in this order: its kernels follow one another. What blocks do side by side may as well
happen in turn, since what one of them has found stays as it is until the next kernel begins, and the credits that the
first one publishes for earlier kernels may arrive late anyway. These must hold, in whatever order steps of different
ranks and arrivals happen:

    STALE       a read or take sees exactly the exchange that it is for
    OVERWRITTEN nothing arrives at a peer in place of what that peer still has to read, or to compare for equality
    BACK        what a rank writes into a word only grows
    TOO_MANY    of what a rank sent to a peer, the peer has at most two exchanges not yet `received`
    STUCK       no rank waits for ever. Programs have no loops, so every run then ends with the ends of all programs
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

STALE = "stale or torn read"
OVERWRITTEN = "overwritten before it was read"
BACK = "a signal went back"
TOO_MANY = "more in flight than credits allow"
STUCK = "stuck"

KINDS = ("dispatch", "combine")  # of the low-latency pair: each has its own words and numbers
OPS = ("plan", "dispatch", "combine")  # of Exchange: each has its own rows
IN_FLIGHT = 2
MOST_ROWS = 2  # of a rank for a peer in one exchange
ANNOUNCED = 2  # words of an announcement

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    f"{do} {sign}": compare for do in ("await", "take") for sign, compare in (("==", operator.eq), (">=", operator.ge))
}


class Rules(NamedTuple):
    """As they stand here, the protocol; with any other value, a mutation of it."""

    halves: int = IN_FLIGHT
    credit: int | None = 2  # send n waits for done >= n - credit; None: not at all
    own_credit: bool = True  # it looks at what the own rank has received too
    credits_first: bool = True  # every kernel publishes `done` first; else after the wait for credits
    credits_of_both_kinds: bool = True  # else of the kernel's own kind alone
    credits_ahead: bool = False  # for what the kernel is about to receive
    credits_early: bool = False  # by the kernel that receives too, before it reads the rows
    entered_early: bool = False  # before the wait for credits
    self_validating: bool = True  # words of announcements; else a flag beside them that releases nothing
    flag_released: bool = True  # after its row
    exact: bool = True  # numbers are compared for equality; else for >=
    # Of Exchange:
    headers: int = 2  # of each source, used in turn
    handshake: bool = True  # no exchange ends before every peer has entered it
    last_use: bool = True  # rows wait for the credit of the exchange that used their memory last; else for none
    done_last: bool = True  # after the last read


class Kernel(NamedTuple):
    """Of one exchange, the whole or a half."""

    kind: str
    n: int
    parts: tuple[str, ...] = ("send", "recv")


class Exchange(NamedTuple):
    """One kernel of `ep::plan`, `ep::dispatch` or `ep::combine`."""

    op: str
    n: int


class Step(NamedTuple):
    do: str
    word: str
    value: int
    ranks: tuple[int, ...]
    after: str = ""

    def __str__(self) -> str:
        released = f", released after {self.after}" if self.after else ""
        preposition = "into" if self.do == "write" else "from"
        return f"{self.do} {self.value}: {self.word} {preposition} ranks {[*self.ranks]}{released}"


def num_rows(source: int, reader: int, n: int) -> int:
    """Uneven, none at times, and other rows than in the exchange that used the half before."""
    return (source + reader + n) % (MOST_ROWS + 1)


def is_bulk(kind: str, n: int) -> bool:
    """Whether rows are bulk copies with flags. Each way comes twice running in a half before the other one does."""
    return (n + (n - 1) // 4 + KINDS.index(kind)) % 2 == 0


def wait_for_credits(rank: int, world_size: int, kind: str, n: int, rules: Rules) -> Iterator[Step]:
    if rules.credit is not None:
        if rules.own_credit:
            yield Step("await >=", f"{kind} received", n - rules.credit, (rank,))
        peers = tuple(p for p in range(world_size) if p != rank)
        yield Step("await >=", f"{kind} done", n - rules.credit, peers)


def enter(world_size: int, kind: str, n: int, rules: Rules) -> Iterator[Step]:
    if kind == "combine":
        yield Step("write", f"{kind} entered[{n % rules.halves}]", n, tuple(range(world_size)))


def send(rank: int, world_size: int, kind: str, n: int, rules: Rules) -> Iterator[Step]:
    everyone = tuple(range(world_size))
    half = n % rules.halves
    for w in range(ANNOUNCED if kind == "dispatch" else 0):
        yield Step("write", f"{kind} announced[{half}][{w}]", n, everyone)
        if not rules.self_validating:
            yield Step("write", f"{kind} announced flag[{half}][{w}]", n, everyone)
    for t in range(MOST_ROWS):
        visited = tuple(p for p in everyone if t < num_rows(rank, p, n))
        if is_bulk(kind, n):
            row = f"{kind} row[{half}][{t}]"
            yield Step("write", row, n, visited)
            yield Step("write", f"{kind} flag[{half}][{t}]", n, visited, row if rules.flag_released else "")
        else:
            yield Step("write", f"{kind} packed row[{half}][{t}]", n, visited)


def recv(rank: int, world_size: int, kind: str, n: int, rules: Rules) -> Iterator[Step]:
    everyone = tuple(range(world_size))
    half = n % rules.halves
    sign = "==" if rules.exact else ">="
    for w in range(ANNOUNCED if kind == "dispatch" else 0):
        word = f"{kind} announced[{half}][{w}]"
        if rules.self_validating:
            yield Step(f"take {sign}", word, n, everyone)
        else:
            yield Step(f"await {sign}", f"{kind} announced flag[{half}][{w}]", n, everyone)
            yield Step("read", word, n, everyone)
    if rules.credits_early:
        yield Step("write", f"{kind} done", n, tuple(p for p in everyone if p != rank))
    if kind == "combine":
        expected = tuple(s for s in everyone if num_rows(s, rank, n) > 0)
        yield Step(f"take {sign}", f"{kind} entered[{half}]", n, expected)
    for t in range(MOST_ROWS):
        visitors = tuple(s for s in everyone if t < num_rows(s, rank, n))
        if is_bulk(kind, n):
            yield Step(f"await {sign}", f"{kind} flag[{half}][{t}]", n, visitors)
            yield Step("read", f"{kind} row[{half}][{t}]", n, visitors)
        else:
            yield Step(f"take {sign}", f"{kind} packed row[{half}][{t}]", n, visitors)
    yield Step("write", f"{kind} received", n, (rank,))


def publish_credits(rank: int, world_size: int, kernel: Kernel, before: list[Step], rules: Rules) -> Iterator[Step]:
    """For what kernels before this one have received; not again what was published already, which changes nothing."""
    written = {step.word: step.value for step in before if step.do == "write"}
    for kind in KINDS if rules.credits_of_both_kinds else (kernel.kind,):
        received = written.get(f"{kind} received", 0)
        if rules.credits_ahead and kind == kernel.kind and "recv" in kernel.parts:
            received = kernel.n
        if received != written.get(f"{kind} done", 0):
            yield Step("write", f"{kind} done", received, tuple(p for p in range(world_size) if p != rank))


def exchange(rank: int, world_size: int, op: str, n: int, last_use: int, rules: Rules) -> Iterator[Step]:
    """`last_use`: the last exchange of that operator before."""
    peers = tuple(p for p in range(world_size) if p != rank)
    done = Step("write", "exchange done", n, peers)
    header = f"exchange header[{n % rules.headers}]"
    sign = "==" if rules.exact else ">="
    yield Step("write", f"{header} fields", n, peers)
    yield Step("write", header, n, peers, f"{header} fields")
    if rules.last_use:
        yield Step("await >=", "exchange done", last_use, peers)
    for t in range(MOST_ROWS):
        visited = tuple(p for p in peers if t < num_rows(rank, p, n))
        row = f"exchange {op} row[{t}]"
        if op == "plan":
            yield Step("write", f"exchange counts[{t}]", n, peers)  # a word that holds its number
        yield Step("write", row, n, visited)
        yield Step("write", f"exchange {op} flag[{t}]", n, visited, row if rules.flag_released else "")
    if rules.handshake:
        yield Step("await >=", header, n, peers)
        yield Step("read", f"{header} fields", n, peers)
    if not rules.done_last:
        yield done
    for t in range(MOST_ROWS):
        visitors = tuple(p for p in peers if t < num_rows(p, rank, n))
        if op == "plan":
            yield Step(f"take {sign}", f"exchange counts[{t}]", n, peers)
        yield Step(f"await {sign}", f"exchange {op} flag[{t}]", n, visitors)
        yield Step("read", f"exchange {op} row[{t}]", n, visitors)
    yield Step("write", "exchange received", n, (rank,))
    if rules.done_last:
        yield done


def program(rank: int, world_size: int, kernels: Sequence[Kernel | Exchange], rules: Rules) -> list[Step]:
    steps: list[Step] = []
    last_use = dict.fromkeys(OPS, 0)
    for kernel in kernels:
        if isinstance(kernel, Exchange):
            steps += exchange(rank, world_size, kernel.op, kernel.n, last_use[kernel.op], rules)
            last_use[kernel.op] = kernel.n
            continue
        numbers = world_size, kernel.kind, kernel.n, rules
        credits = [*publish_credits(rank, world_size, kernel, steps, rules)]
        allowed: list[Step] = []
        if "send" in kernel.parts:
            waits, entered = [*wait_for_credits(rank, *numbers)], [*enter(*numbers)]
            allowed = [*entered, *waits] if rules.entered_early else [*waits, *entered]
        steps += [*credits, *allowed] if rules.credits_first else [*allowed, *credits]
        for part in kernel.parts:
            steps += {"send": send, "recv": recv}[part](rank, *numbers)
    return [step for step in steps if step.ranks]


Position = tuple[int, ...]  # steps that each rank has done
State = tuple[Position, tuple[int, ...]]  # and, where they are followed, how many writes have arrived


class _Words(NamedTuple):
    """All that one rank does with one word in the memory of one rank, over its whole program."""

    values: list[int]  # written, one after the other; the first: what is there before
    after: list[str]  # of each of these: as in Step
    released: list[int]  # how many writes of the word `after` have to arrive before it
    written: list[int]  # of each number of steps: how many writes are among them


class Model:
    """Programs of all ranks, with what follows from them alone."""

    def __init__(self, programs: list[list[Step]]) -> None:
        self.programs = programs
        self.ranks = range(len(programs))
        self.words = {(s, p): self._written(s, p) for s in self.ranks for p in self.ranks}
        # last_use[p, s, word, value]: the last step of p that needs it.
        self.last_use: dict[tuple[int, int, str, int], int] = {}
        for p, steps in enumerate(programs):
            for i, step in enumerate(steps):
                if step.do not in ("write", "await >="):
                    self.last_use.update({(p, s, step.word, step.value): i for s in step.ranks})
        # known[p][i][s, word]: of the writes of `word` by s, how many p is sure of after i steps.
        self.known = [self._learnt(p) for p in self.ranks]

    def _written(self, source: int, reader: int) -> dict[str, _Words]:
        steps = self.programs[source]
        words = {s.word: _Words([0], [""], [0], [0]) for own in self.programs for s in own}
        for step in steps:
            if step.do == "write" and reader in step.ranks:
                word = words[step.word]
                word.values.append(step.value)
                word.after.append(step.after)
                word.released.append(len(words[step.after].values) - 1 if step.after else 0)
            for word in words.values():
                word.written.append(len(word.values) - 1)
        return words

    def _learnt(self, reader: int) -> list[dict[tuple[int, str], int]]:
        known: list[dict[tuple[int, str], int]] = [{}]
        for step in self.programs[reader]:
            now = dict(known[-1])
            for s in step.ranks if step.do in _COMPARE else ():
                word, least = self.words[s, reader][step.word], now.get((s, step.word), 0)
                found = [i for i in range(least, len(word.values)) if _COMPARE[step.do](word.values[i], step.value)]
                if found:  # else this step is never over
                    now[s, step.word] = found[0]
                    if after := word.after[found[0]]:
                        now[s, after] = max(now.get((s, after), 0), word.released[found[0]])
            known.append(now)
        return known

    def written(self, at: Position, source: int, reader: int, word: str) -> int:
        return self.words[source, reader][word].written[at[source]]

    def breaks(self, at: Position, rank: int, sees: Callable[[int, int, str], list[int]]) -> set[str] | None:
        """Returns the promises that the next step of `rank` breaks by itself. None: the step has to wait.

        `sees(source, reader, word)`: values that the reader may find.
        """
        step = self.programs[rank][at[rank]]
        if step.do == "write":
            return self._breaks_by_writing(at, rank, step)
        found = [sees(s, rank, step.word) for s in step.ranks]
        if step.do in _COMPARE:
            found = [[v for v in values if _COMPARE[step.do](v, step.value)] for values in found]
            if not all(found):
                return None
        reads = step.do.startswith(("take", "read"))
        return {STALE for values in found if reads and values != [step.value]}

    def _breaks_by_writing(self, at: Position, rank: int, step: Step) -> set[str]:
        broken, received = set(), f"{step.word.split()[0]} received"
        for p in step.ranks:
            if step.value <= self.words[rank, p][step.word].values[self.written(at, rank, p, step.word)]:
                broken.add(BACK)
            if p != rank and not step.word.endswith(" done"):
                was_received = self.words[p, p][received].values[self.written(at, p, p, received)]
                if step.value - was_received > IN_FLIGHT:
                    broken.add(TOO_MANY)
        return broken

    def breaks_by_arriving(self, at: Position, source: int, reader: int, word: str, count: int) -> set[str]:
        """Returns the promises that the arrival of write number `count` of a word breaks."""
        old = self.words[source, reader][word].values[count - 1]
        return {OVERWRITTEN} if self.last_use.get((reader, source, word, old), -1) >= at[reader] else set()


class Outcome(NamedTuple):
    states: int
    broken: dict[str, list[str]]  # what does not hold, each with a shortest run that shows it

    def __str__(self) -> str:
        runs = ("\n    ".join([f"{name}:", *lines]) for name, lines in self.broken.items())
        return "\n".join([f"{self.states} states", *runs])


class _Move(NamedTuple):
    what: list[str]
    to: State
    broken: set[str]


def _advanced(at: Position, rank: int) -> Position:
    return (*at[:rank], at[rank] + 1, *at[rank + 1 :])


def _moves_with_arrivals(model: Model, slots: dict[tuple[int, int, str], int], state: State) -> Iterator[_Move]:
    """Every step of a rank and every arrival by itself. `slots`: where `state` has what has arrived of each word."""
    at, arrived = state

    def sees(source: int, reader: int, word: str) -> list[int]:
        slot = slots.get((source, reader, word))
        count = model.written(at, source, reader, word) if slot is None else arrived[slot]
        return [model.words[source, reader][word].values[count]]

    for r, steps in enumerate(model.programs):
        if at[r] < len(steps) and (broken := model.breaks(at, r, sees)) is not None:
            yield _Move([f"rank {r}: {steps[at[r]]}"], (_advanced(at, r), arrived), broken)
    for (s, p, name), slot in slots.items():
        word, count = model.words[s, p][name], arrived[slot] + 1
        if count > word.written[at[s]]:
            continue
        after = word.after[count]
        if not after or arrived[slots[s, p, after]] >= word.released[count]:
            what = [f"arrives at rank {p}: {name} = {word.values[count]} of rank {s}"]
            to = at, (*arrived[:slot], count, *arrived[slot + 1 :])
            yield _Move(what, to, model.breaks_by_arriving(at, s, p, name, count))


def _moves(model: Model, state: State) -> Iterator[_Move]:
    """The same in fewer states: without arrivals, and with writes joined to the step before them.

    Sound, and nothing is missed, because:
    - A write may arrive as soon as it was written, unless it is released after another; nothing else hinders it, and
      an arrival hinders nothing. So of each word a reader may find any write from the last one that it is sure of (by
      what it awaited, and what that was released after) to the last one that was written: a step is possible if one of
      these lets it pass, and a read is right if all of them are. That an awaited write arrives later is the same run
      as one in which the reader gets to its step later.
    - That a reader misses what it waits for needs a later write of the same word that does not let it pass. That is
      OVERWRITTEN (==) or BACK (>=), found when it is written, the first moment at which it may arrive.
    - A write waits for nothing and takes no step from others. The earlier it is, the more it may break, since others
      only get further with their reads and credits. So runs in which it is written at once are enough. `received`
      stands for the end of the last read, which its rank may come to at any time.
    """
    at, _ = state

    def sees(source: int, reader: int, word: str) -> list[int]:
        last = model.written(at, source, reader, word)
        first = last if source == reader else model.known[reader][at[reader]].get((source, word), 0)
        return model.words[source, reader][word].values[first : last + 1]

    for r, steps in enumerate(model.programs):
        to, broken = at, set()
        what: list[str] = []
        while to[r] < len(steps) and (not what or steps[to[r]].do == "write"):
            step, breaks = steps[to[r]], model.breaks(to, r, sees)
            if breaks is None:
                break
            broken |= breaks
            for p in step.ranks if step.do == "write" else ():
                if p != r:
                    count = model.written(to, r, p, step.word) + 1
                    broken |= model.breaks_by_arriving(to, r, p, step.word, count)
            what.append(f"rank {r}: {step}")
            to = _advanced(to, r)
        if what:
            yield _Move(what, (to, ()), broken)


def search(programs: list[list[Step]], follow_arrivals: bool = False) -> Outcome:
    """Breadth first through every state; a run ends where data is lost.

    `follow_arrivals`: by the definition, every arrival a step of its own; for very small programs only.
    """
    model = Model(programs)
    slots: dict[tuple[int, int, str], int] = {}
    if follow_arrivals:
        for (s, p), words in model.words.items():
            for name, word in words.items():
                if s != p and len(word.values) > 1:
                    slots[s, p, name] = len(slots)
    start: State = (0,) * len(programs), (0,) * len(slots)
    came_from: dict[State, tuple[State, list[str]]] = {}
    seen, queue = {start}, deque([start])
    broken: dict[str, list[str]] = {}

    def run_to(state: State, last: list[str]) -> list[str]:
        lines = last
        while state != start:
            state, what = came_from[state]
            lines = what + lines
        return lines

    while queue:
        state = queue.popleft()
        moved = False
        for what, to, breaks in _moves_with_arrivals(model, slots, state) if follow_arrivals else _moves(model, state):
            moved = True
            for name in breaks:
                broken.setdefault(name, run_to(state, what))
            if not breaks & {STALE, OVERWRITTEN} and to not in seen:
                seen.add(to)
                came_from[to] = state, what
                queue.append(to)
        if not moved:
            ends = enumerate(zip(programs, state[0], strict=True))
            waits = [f"rank {r} waits: {steps[i]}" for r, (steps, i) in ends if i < len(steps)]
            if waits:
                broken.setdefault(STUCK, run_to(state, waits))
    return Outcome(len(seen), broken)
