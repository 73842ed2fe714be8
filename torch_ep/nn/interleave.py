"""Runs two micro-batches alternately, so that the exchanges of one overlap with the work of the other."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

__all__ = ["interleave"]


def interleave(*batches: Generator[None, None, Any]) -> list[Any]:
    """Runs generators alternately, each up to its next `yield`, and returns their results.

    A model that yields where an exchange is in flight lets the other micro-batch run meanwhile. `nn.MoE.steps` does;
    layers around it pass that on:

        def steps(self, x):
            x = x + self.attention(x)
            y, stats = yield from self.moe.steps(x)
            return x + y

        a, b = torch_ep.nn.interleave(model.steps(xa), model.steps(xb))

    This is the schedule of two micro-batches in DualPipe (DeepSeek-V3, arXiv:2412.19437, section 3.2.1), forward and
    backward apart. Results equal those of one micro-batch after the other. `loss_a + loss_b` has a backward that
    interleaves likewise. Every rank passes the same number of generators in the same order.

    Args:
        batches: at most two generators that exchange, since a group has two exchanges of each kind in flight.

    Returns:
        What each generator returns.

    Raises:
        Whatever a generator raises; the others are closed.
    """
    results: list[Any] = [None] * len(batches)
    running = dict(enumerate(batches))
    try:
        while running:
            for index, batch in list(running.items()):
                try:
                    next(batch)
                except StopIteration as end:
                    results[index] = end.value
                    del running[index]
    finally:
        for batch in running.values():
            batch.close()
    return results
