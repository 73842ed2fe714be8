"""The signals of the low-latency pair as a formal model, and a search through everything that may happen.

The protocol is what `send` and `recv` say: four kinds of steps on words of symmetric memory. Every rank has a word of a
name in every rank's memory, its own included: rank s writes, the rank p in whose memory it lies reads. Words hold the
number of the exchange that they were written in, which stands for the data too; at first they hold 0.

    write       into the memory of `ranks`. What one rank wrote arrives at each peer in any order, at any time, except
                that the writes of one word arrive in their order, and a write with `after` (a release) only when
                what was written before into the word `after` has arrived. A flag releases its own data and nothing
                else: less than a release of the PTX memory model does.
    await ==, await >=
                what `ranks` wrote here, before the rank goes on (an acquire)
    read        what `ranks` wrote here. That takes its time, which ends with the step.

Only arrivals are late. Awaits and reads are over when the next step of their rank begins: `done` is released after the
reads, and writes follow the acquire of their credit. What a rank writes into its own memory it sees at once.

A program is what one rank does, in this order: its kernels follow one another, and what blocks do side by side may as
well happen in turn, since what one of them has found stays as it is until `done`. These must hold, in whatever order
steps of different ranks and arrivals happen:

    STALE       a read sees exactly the exchange that it is for
    OVERWRITTEN nothing arrives at a peer in place of what that peer still has to read, or to compare for equality
    BACK        what a rank writes into a word only grows
    TOO_MANY    of what a rank sent to a peer, the peer has at most two exchanges not yet given back (`done`)
    STUCK       no rank waits for ever. Programs have no loops, so every run then ends with the ends of all programs
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

STALE = "stale or torn read"
OVERWRITTEN = "overwritten before it was read"
BACK = "a signal went back"
TOO_MANY = "more in flight than credits allow"
STUCK = "stuck"

IN_FLIGHT = 2
MOST_ROWS = 2  # of a rank for a peer in one exchange

_COMPARE: dict[str, Callable[[int, int], bool]] = {"await ==": operator.eq, "await >=": operator.ge}


class Rules(NamedTuple):
    """As they stand here, the protocol; with any other value, a mutation of it."""

    halves: int = IN_FLIGHT
    credit: int | None = 2  # send n waits for done >= n - credit; None: not at all
    epoch_released: bool = True  # after the other words of the header
    flag_released: bool = True  # after its row
    own_credit: bool = True  # the own rank's too
    exact: bool = True  # epochs and flags are compared for equality; else for >=
    done_last: bool = True  # after all reads; else before those of rows


class Action(NamedTuple):
    part: str  # send, recv
    kind: str  # dispatch, combine: each has its own words and numbers
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


def send(rank: int, world_size: int, kind: str, n: int, rules: Rules) -> Iterator[Step]:
    everyone = tuple(range(world_size))
    half = n % rules.halves
    if rules.credit is not None:
        readers = everyone if rules.own_credit else tuple(p for p in everyone if p != rank)
        yield Step("await >=", f"{kind} done", n - rules.credit, readers)
    header, epoch = f"{kind} header[{half}]", f"{kind} epoch[{half}]"
    yield Step("write", header, n, everyone)
    yield Step("write", epoch, n, everyone, header if rules.epoch_released else "")
    for t in range(MOST_ROWS):
        row, flag = f"{kind} row[{half}][{t}]", f"{kind} flag[{half}][{t}]"
        visited = tuple(p for p in everyone if t < num_rows(rank, p, n))
        yield Step("write", row, n, visited)
        yield Step("write", flag, n, visited, row if rules.flag_released else "")


def recv(rank: int, world_size: int, kind: str, n: int, rules: Rules) -> Iterator[Step]:
    everyone = tuple(range(world_size))
    half = n % rules.halves
    wait = "await ==" if rules.exact else "await >="
    reads = [
        Step(wait, f"{kind} epoch[{half}]", n, everyone),
        Step("read", f"{kind} header[{half}]", n, everyone),
    ]
    for t in range(MOST_ROWS):
        visitors = tuple(s for s in everyone if t < num_rows(s, rank, n))
        reads.append(Step(wait, f"{kind} flag[{half}][{t}]", n, visitors))
        reads.append(Step("read", f"{kind} row[{half}][{t}]", n, visitors))
    reads = [step for step in reads if step.ranks]
    done = Step("write", f"{kind} done", n, everyone)
    yield from [*reads, done] if rules.done_last else [*reads[:2], done, *reads[2:]]


def program(rank: int, world_size: int, actions: list[Action], rules: Rules) -> list[Step]:
    parts = {"send": send, "recv": recv}
    steps = (s for part, kind, n in actions for s in parts[part](rank, world_size, kind, n, rules))
    return [step for step in steps if step.ranks]


Position = tuple[int, ...]  # steps that each rank has done
State = tuple[Position, tuple[int, ...]]  # and, where they are followed, how many writes have arrived


class _Words(NamedTuple):
    """What one rank does with one word in the memory of one rank, over its whole program."""

    values: list[int]  # written, one after the other; the first: what is there before
    after: list[str]  # of each of these: as in Step
    released: list[int]  # how many writes of the word `after` have to arrive before it
    written: list[int]  # of each number of steps: how many writes are among them


class Model:
    """Programs of all ranks, with what can be told from them alone."""

    def __init__(self, programs: list[list[Step]]) -> None:
        self.programs = programs
        self.ranks = range(len(programs))
        self.words = {(s, p): self._written(s, p) for s in self.ranks for p in self.ranks}
        # last_use[p, s, word, value]: the last step of p that needs it.
        self.last_use: dict[tuple[int, int, str, int], int] = {}
        for p, steps in enumerate(programs):
            for i, step in enumerate(steps):
                if step.do in ("read", "await =="):
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
        """What the next step of `rank` breaks by itself. None: it has to wait.

        `sees(source, reader, word)`: values that the reader may find.
        """
        step = self.programs[rank][at[rank]]
        if step.do == "write":
            return self._breaks_by_writing(at, rank, step)
        seen = [sees(s, rank, step.word) for s in step.ranks]
        if step.do == "read":
            return {STALE for values in seen if values != [step.value]}
        return set() if all(any(_COMPARE[step.do](v, step.value) for v in values) for values in seen) else None

    def _breaks_by_writing(self, at: Position, rank: int, step: Step) -> set[str]:
        broken, done = set(), f"{step.word.split()[0]} done"
        for p in step.ranks:
            if step.value <= self.words[rank, p][step.word].values[self.written(at, rank, p, step.word)]:
                broken.add(BACK)
            if p != rank and step.word != done:
                given_back = self.words[p, rank][done].values[self.written(at, p, rank, done)]
                if step.value - given_back > IN_FLIGHT:
                    broken.add(TOO_MANY)
        return broken

    def breaks_by_arriving(self, at: Position, source: int, reader: int, word: str, count: int) -> set[str]:
        """What the arrival of write number `count` of a word breaks."""
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
      OVERWRITTEN (await ==) or BACK (await >=), found when it is written, the first moment at which it may arrive.
    - A write waits for nothing and takes no step from others. The earlier it is, the more it may break, since others
      only get further with their reads and credits. So runs in which it is written at once are enough.
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
