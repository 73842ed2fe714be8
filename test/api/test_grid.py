"""Grids of nodes: exchanges over rails and inside nodes equal their reference by the bit, and flat ones by value."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import PATIENCE, random_topk, same_bits, seeded, short_timeout, world
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import torch_ep
from torch_ep import grid, reference

GRIDS = [(2, 2), (3, 2), (2, 4), (4, 2)]  # nodes, ranks per node
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
TOKENS = [13, 0, 5, 24, 1, 0, 7, 2]  # per rank
NUM_TOPK, HIDDEN = 6, 7
WIDE = 515  # rows that the two levels exchange in several parts of columns


def _topk_idx(seed: int, world_size: int, num_experts: int, unwanted: range = range(0)) -> list[Tensor]:
    """Of every rank: some tokens without experts, a rank without any token; no token visits `unwanted` experts."""
    results = []
    for rank in range(world_size):
        tokens = TOKENS[(rank + seed) % len(TOKENS)]
        idx = random_topk(tokens, NUM_TOPK, num_experts, seeded(seed, rank), 0.3)
        idx[3::5] = -1
        idx[(idx >= unwanted.start) & (idx < unwanted.stop)] = -1
        results.append(idx)
    return results


def _random(seed: int, shapes: list[Any], dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(shape, generator=seeded(seed, r), dtype=torch.float64).to(dtype) for r, shape in enumerate(shapes)
    ]


def _equal(differences: list[str], name: str, got: Tensor | None, want: Tensor | None) -> None:
    """Collects differences, so that a rank that finds one still takes part in the exchanges that follow."""
    if (got is None) != (want is None) or (got is not None and want is not None and not same_bits(got, want)):
        differences.append(f"{name}: expected {want}, got {got}")


def _equals_reference(rank: int, world_size: int, grid: tuple[int, int]) -> str:
    differences: list[str] = []
    num_experts, num_nodes = 4 * world_size, grid[0]
    cases = itertools.product((None, 0, 32, 512), ("rank_major", "expert_major"), (None, 9))
    for seed, (capacity, layout, relay_rows) in enumerate(cases):
        communicator = torch_ep.init(
            timeout=PATIENCE, ranks_per_node=grid[1], max_tokens_per_rank=32, max_relay_rows=relay_rows
        )
        relay_rows = communicator.max_relay_rows
        if capacity is None and relay_rows == 9:
            continue
        alignment = 4 if layout == "expert_major" else 1
        # A node without tokens' experts, then one that no token visits.
        unwanted = range(num_experts // num_nodes) if seed % 3 == 0 else range(0)
        idx = _topk_idx(seed, world_size, num_experts, unwanted)
        if seed % 2:
            idx[: grid[1]] = [t[:0] for t in idx[: grid[1]]]  # a node without tokens
        dtype = (torch.float32, torch.bfloat16, torch.float64)[seed % 3]
        options: dict[str, Any] = {"layout": layout, "capacity": capacity, "alignment": alignment}
        plan = torch_ep.plan(idx[rank], num_experts, **options)
        plans = reference.plan(idx, num_experts, **options, ranks_per_node=grid[1], max_relay_rows=relay_rows)
        label = f"{layout}, capacity {capacity}, relay rows {relay_rows}"
        for level, got, want in (("rail", plan.rail, plans[rank].rail), ("node", plan, plans[rank])):
            for field, ours, theirs in zip(got._fields[:8], got[:8], want[:8], strict=True):
                _equal(differences, f"{label}: {level}.{field}", ours, theirs)
        x = _random(seed, [(t.shape[0], WIDE if seed % 4 < 2 else HIDDEN) for t in idx], dtype)
        w = _random(seed + 1, [t.shape for t in idx], torch.float32)
        rows, weights, scales = torch_ep.dispatch(
            x[rank], plan, topk_weights=w[rank], scales=x[rank][:, :3].contiguous()
        )
        moved = reference.dispatch(x, plans, topk_weights=w)
        _equal(differences, f"{label}: rows", rows, moved[rank][0])
        _equal(differences, f"{label}: weights", weights, moved[rank][1])
        _equal(differences, f"{label}: scales", scales, moved[rank][0][:, :3].contiguous())
        y = _random(seed + 2, [r.shape for r, _ in moved], dtype)
        received = [v for _, v in moved]
        sums, returned = torch_ep.combine(y[rank], plan, topk_weights=weights)
        want = reference.combine(y, plans, topk_weights=received)[rank]
        _equal(differences, f"{label}: sums", sums, want[0])
        _equal(differences, f"{label}: returned weights", returned, want[1])
        if layout == "expert_major":
            got = torch_ep.combine(y[rank], plan, row_weights=weights)
            _equal(
                differences,
                f"{label}: weighted",
                got,
                reference.combine(y, plans, row_weights=received)[rank][0],
            )
    torch_ep.init(timeout=PATIENCE)
    return "\n".join(differences)


@grids
def test_equals_reference(grid: tuple[int, int]) -> None:
    nodes, ranks_per_node = grid
    assert world(nodes * ranks_per_node).run(_equals_reference, grid) == [""] * nodes * ranks_per_node


def _layer(x: Tensor, w: Tensor, idx: Tensor, num_experts: int, group: Any, layout: str) -> Tensor:
    plan = torch_ep.plan(idx, num_experts, group, layout=layout)
    rows, weights = torch_ep.dispatch(x, plan, topk_weights=w)
    if layout == "rank_major":
        return torch_ep.combine(rows.sin() * weights.sum(1, keepdim=True).cos(), plan)
    return torch_ep.combine(rows.sin(), plan, row_weights=weights)


def _equals_flat(rank: int, world_size: int, grid: tuple[int, int]) -> None:
    """Values and gradients; eager and compiled."""
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=("node", "local"))
    torch_ep.init(mesh, timeout=PATIENCE)
    num_experts = 2 * world_size
    for seed, layout in enumerate(("expert_major", "rank_major")):
        idx = _topk_idx(seed, world_size, num_experts)[rank]
        x = _random(seed, [(idx.shape[0], HIDDEN)] * (rank + 1), torch.float64)[rank]
        w = _random(seed + 1, [idx.shape] * (rank + 1), torch.float64)[rank]
        outcomes = []
        compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for function, group in ((_layer, None), (_layer, mesh), (compiled, mesh)):
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            out = function(*leaves, idx, num_experts, group, layout)
            out.sin().sum().backward()
            outcomes.append([out.detach(), *(t.grad for t in leaves)])
        if layout == "rank_major":
            outcomes = outcomes[1:]  # the sum of weights here is that of other rows
        for outcome in outcomes[1:]:
            torch.testing.assert_close(outcome, outcomes[0])
    torch_ep.destroy(mesh)


@grids
def test_equals_the_flat_exchange_by_value(grid: tuple[int, int]) -> None:
    world(grid[0] * grid[1]).run(_equals_flat, grid)


def _adjoint(rank: int, world_size: int) -> None:
    """<D x, y> == <x, D^T y> over all ranks; derivatives of first and second order equal numerical ones."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2)
    num_experts = 2 * world_size
    idx = _topk_idx(3, world_size, num_experts)[rank]
    plan = torch_ep.plan(idx, num_experts)
    x = torch.randn(idx.shape[0], 3, generator=seeded(rank), dtype=torch.float64)
    rows = torch_ep.dispatch(x, plan)
    y = torch.randn(rows.shape, generator=seeded(rank, 1), dtype=torch.float64)
    products = torch.stack([(rows * y).sum(), (x * torch_ep.combine(y, plan)).sum()])
    dist.all_reduce(products)
    torch.testing.assert_close(products[0], products[1])
    torch_ep.init(timeout=PATIENCE)


def test_dispatch_and_combine_are_adjoint() -> None:
    world(4).run(_adjoint)


def _opcheck(rank: int, world_size: int) -> list[str]:
    """In lockstep: every rank runs the same checks, and so the same exchanges."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2)
    plan = torch_ep.plan(random_topk(5, 3, 2 * world_size, seeded(rank)), 2 * world_size)
    assert plan.rail is not None
    fields = [(p.send_row, p.send_counts, p.recv_counts) for p in (plan.rail, plan)]
    names = ("expert_major", plan.rail.group_name, plan.group_name)
    arguments = (*fields[0], plan.rail.recv_topk_idx, *fields[1], plan.recv_pair, *names)
    x, w = torch.randn(5, WIDE, requires_grad=True), torch.rand(5, 3, requires_grad=True)
    y, v = torch.randn(plan.num_rows, WIDE, requires_grad=True), torch.rand(plan.num_rows, requires_grad=True)
    failed = []
    for op, inputs in (
        (torch.ops.ep.dispatch.grid, (x, w, None)),
        (torch.ops.ep.combine.grid, (y, v, None)),
        (torch.ops.ep.combine.grid_weighted, (y, v)),
    ):
        results = torch.library.opcheck(op, (*inputs, *arguments), raise_exception=False)
        failed += [f"{op}, {test}: {result}" for test, result in results.items() if result != "SUCCESS"]
    torch_ep.init(timeout=PATIENCE)
    return failed


def test_opcheck_in_lockstep() -> None:
    assert world(4).run(_opcheck) == [[]] * 4


def _numerical(rank: int, world_size: int) -> None:
    """The derivatives equal numerical ones: every rank perturbs its own inputs, and the outputs of all are summed."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2)
    idx = random_topk(2, 2, world_size, seeded(rank), 0.2)
    plan = torch_ep.plan(idx, world_size)
    shapes = [(2, 2), (2, 2)]
    inputs = [torch.randn(s, generator=seeded(rank, i), dtype=torch.float64) for i, s in enumerate(shapes)]

    def function(x: Tensor, w: Tensor) -> Tensor:
        rows, weights = torch_ep.dispatch(x, plan, topk_weights=w)
        return torch_ep.combine(rows.sin(), plan, row_weights=weights).cos()

    leaves = [t.clone().requires_grad_() for t in inputs]
    for order in (1, 2):
        outputs: tuple[Tensor, ...] = (function(*leaves),)
        if order == 2:
            outputs = torch.autograd.grad(outputs[0].sin().sum(), leaves, create_graph=True)
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), leaves)
        directions = [
            torch.randn(s, generator=seeded(rank, order, i), dtype=torch.float64) for i, s in enumerate(shapes)
        ]

        def total(step: float, order: int = order, directions: list[Tensor] = directions) -> Tensor:
            moved = [(t + step * d).requires_grad_() for t, d in zip(inputs, directions, strict=True)]
            outputs: Any = (function(*moved),)
            if order == 2:
                outputs = torch.autograd.grad(outputs[0].sin().sum(), moved)
            return sum(o.detach().sum() for o in outputs)

        step = 1e-6
        sums = torch.stack(
            [
                (total(step) - total(-step)) / (2 * step),
                sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)),
            ]
        )
        dist.all_reduce(sums)
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-6, atol=1e-7)
    torch_ep.init(timeout=PATIENCE)


def test_first_and_second_derivatives_equal_numerical_ones() -> None:
    world(4).run(_numerical)


def _moe(rank: int, world_size: int, layout: str, capacity: int | None) -> None:
    """The layer, unchanged, gives on a grid what it gives on the flat group; compiled too."""
    x = torch.randn(9 + rank, 16, generator=seeded(rank))
    outcomes = []
    for ranks_per_node in (None, 2):
        torch_ep.init(timeout=PATIENCE, ranks_per_node=ranks_per_node, max_tokens_per_rank=32)
        torch.manual_seed(0)
        layer = torch_ep.nn.MoE(16, 8, 2 * world_size, 3, layout=layout, capacity=capacity, shared_intermediate=8)
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            layer.zero_grad()
            out, stats = function(x)
            (out.square().sum() + stats.aux_loss).backward()
            norm = torch_ep.nn.clip_grad_norm_(layer, 1.0)
            outcomes.append([out.detach(), norm, *(p.grad for p in layer.parameters())])
            assert stats.num_dropped == 0
        state = torch_ep.nn.full_state_dict(layer)
        assert state["gate_proj"].shape[0] == 2 * world_size
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-4, atol=1e-5)
    torch_ep.init(timeout=PATIENCE)


@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
@pytest.mark.parametrize("capacity", [None, 400], ids=["exact", "capacity"])
def test_layer_on_a_grid(layout: str, capacity: int | None) -> None:
    world(4).run(_moe, layout, capacity)


def _low_latency(rank: int, world_size: int, quantize: Any) -> str:
    """Whole, in halves, and with fewer tokens than there is room for; counters of rows and waits."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2)
    differences: list[str] = []
    num_experts, most = 2 * world_size, 24
    for seed in range(2):
        idx = _topk_idx(seed, world_size, num_experts)
        x = _random(seed, [(t.shape[0], 130) for t in idx], torch.float32)
        w = _random(seed + 1, [t.shape for t in idx], torch.float32)
        want_rows, want_scales, want = reference.low_latency_dispatch(
            x, idx, num_experts, most, topk_weights=w, quantize=quantize, ranks_per_node=2
        )[rank]
        statistics = torch_ep.LowLatencyStatistics.zeros(num_experts)
        arguments: dict[str, Any] = {
            "num_experts": num_experts,
            "max_tokens_per_rank": most,
            "topk_weights": w[rank],
            "quantize": quantize,
        }
        in_flight = torch_ep.low_latency_dispatch_send(x[rank], idx[rank], **arguments)
        for received, plan in (
            torch_ep.low_latency_dispatch_recv(in_flight, statistics=statistics),
            torch_ep.low_latency_dispatch(x[rank], idx[rank], **arguments, statistics=statistics),
        ):
            rows, scales = received if quantize else (received, None)
            for name in ("tokens_per_expert", "source_offsets", "recv_pair", "recv_row"):
                _equal(differences, name, getattr(plan, name), getattr(want, name))
            for expert, count in enumerate(plan.tokens_per_expert.tolist()):
                _equal(differences, "rows", rows[expert, :count], want_rows[expert, :count])
                if scales is not None and want_scales is not None:
                    got = scales[expert, :count].contiguous()
                    _equal(differences, "scales", got, want_scales[expert, :count].contiguous())
            y = _random(seed + 2, [want_rows.shape] * world_size, torch.bfloat16)
            plans = [
                p
                for *_, p in reference.low_latency_dispatch(x, idx, num_experts, most, topk_weights=w, ranks_per_node=2)
            ]
            sums = reference.low_latency_combine(y, plans)[rank]
            _equal(differences, "sums", torch_ep.low_latency_combine(y[rank], plan, statistics=statistics), sums)
            sent = torch_ep.low_latency_combine_send(y[rank], plan)
            _equal(differences, "sums in halves", torch_ep.low_latency_combine_recv(sent), sums)
        _equal(differences, "counted rows", statistics.tokens_per_expert, 2 * want.tokens_per_expert.long())
        if statistics.wait_ns.shape != (world_size,):
            differences.append(f"wait_ns: {statistics.wait_ns}")
    message = _message(
        torch_ep.low_latency_dispatch,
        torch.zeros(9 if rank == 1 else 2, 4),
        torch.zeros(9 if rank == 1 else 2, 1, dtype=torch.int64),
        num_experts=num_experts,
        max_tokens_per_rank=8,
    )
    if "ep::low_latency_dispatch: expected at most max_tokens_per_rank = 8 tokens, got 9" not in message:
        differences.append(message)
    torch_ep.init(timeout=PATIENCE)
    return "\n".join(differences)


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_low_latency_pair_equals_reference(quantize: Any) -> None:
    assert world(4).run(_low_latency, quantize) == [""] * 4


def _decode(rank: int, world_size: int) -> None:
    x = torch.randn(3 + rank, 16, generator=seeded(rank))
    outcomes = []
    for ranks_per_node in (None, 2):
        torch_ep.init(timeout=PATIENCE, ranks_per_node=ranks_per_node)
        torch.manual_seed(0)
        layer = torch_ep.nn.MoE(16, 8, 2 * world_size, 3)
        with torch.no_grad():
            for decode in (layer.decode, torch.compile(layer.decode, fullgraph=True, backend="aot_eager")):
                outcomes.append(decode(x, 8))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-4, atol=1e-5)
    torch_ep.init(timeout=PATIENCE)


def test_decode_on_a_grid() -> None:
    world(4).run(_decode)


def _what_init_says(rank: int, world_size: int) -> list[Any]:
    results: list[Any] = []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    for group, options in (
        (mesh, {}),
        (None, {"ranks_per_node": 2, "max_tokens_per_rank": 8}),
        (None, {"ranks_per_node": "auto"}),
        (None, {"ranks_per_node": 4}),
        (None, {"ranks_per_node": 1}),
    ):
        communicator = torch_ep.init(group, timeout=PATIENCE, **options)
        results.append((communicator.backend, communicator.reason, communicator.max_relay_rows))
        levels = (communicator.rail, communicator.node)
        results[-1] += tuple(None if level is None else (level.rank, level.world_size) for level in levels)
    torch_ep.init(timeout=PATIENCE)
    torch_ep.destroy(mesh)
    return results


def test_init_reports_both_levels() -> None:
    for rank, (by_mesh, asked, auto, one_node, one_rank) in enumerate(world(4).run(_what_init_says)):
        position = ((rank // 2, 2), (rank % 2, 2))
        assert by_mesh[0] == asked[0] == "hierarchical"
        assert "2 nodes of 2 ranks (a DeviceMesh): c10d between them (" in by_mesh[1]
        assert "2 nodes of 2 ranks (asked for): c10d between them (" in asked[1]
        assert by_mesh[2:] == (None, *position)
        assert asked[2:] == (16, *position)
        assert auto[0] == one_node[0] == one_rank[0] == "c10d"
        assert auto[1].startswith("no grid: all ranks are on one host; ")
        assert one_node[1].startswith("no grid: one node; ")
        assert one_rank[1].startswith("no grid: one rank per node; ")
        assert auto[2:] == one_node[2:] == one_rank[2:] == (None, None, None)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["a", "a", "b", "b"], (2, "2 hosts of 2 ranks")),
        (["a", "a", "a"], (None, "all ranks are on one host")),
        (["a", "b", "a", "b"], (None, "the ranks of a host are not consecutive")),
        (["a", "a", "b"], (None, "hosts have different numbers of ranks: [2, 1]")),
        (["a", "b"], (None, "every host has one rank")),
    ],
)
def test_auto_takes_regular_hosts_alone(hosts: list[str], expected: tuple[int | None, str]) -> None:
    assert torch_ep.grid.ranks_per_node_of(hosts) == expected


def _message(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "nothing raised"


def _bad_argument_of_one(rank: int, world_size: int, case: str) -> str:
    """Rank 1 of a 2 x 2 grid has the bad argument; then all ranks go on."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2, max_tokens_per_rank=8, max_relay_rows=10)
    num_experts, bad = 8, rank == 1
    idx = random_topk(4, 2, num_experts, seeded(rank), 0)
    plan = torch_ep.plan(idx, num_experts)
    x, y = torch.zeros(4, 3), torch.zeros(plan.num_rows, 3)
    if case == "plan: alignment":
        message = _message(torch_ep.plan, idx, num_experts, alignment=-1 if bad else 1)
    elif case == "plan: type":
        message = _message(torch_ep.plan, idx.tolist() if bad else idx, num_experts)
    elif case == "plan: tokens":
        message = _message(torch_ep.plan, idx.repeat(3, 1) if bad else idx, num_experts)
    elif case == "plan: index":
        message = _message(torch_ep.plan, idx + 8 if bad else idx, num_experts)
    elif case == "dispatch: rows":
        message = _message(torch_ep.dispatch, x[1:] if bad else x, plan)
    elif case == "dispatch: hidden":
        message = _message(torch_ep.dispatch, x[:, 1:].contiguous() if bad else x, plan)
    elif case == "combine: rows":
        message = _message(torch_ep.combine, y[1:] if bad else y, plan)
    elif case == "combine: type":
        message = _message(torch_ep.combine, None if bad else y, plan)
    _equals_layer_of_one_rank(rank, world_size)
    return message


def _equals_layer_of_one_rank(rank: int, world_size: int) -> None:
    """The group is usable: a token's row comes back once per expert."""
    idx = random_topk(4, 2, 8, seeded(rank), 0)
    plan = torch_ep.plan(idx, 8)
    x = torch.randn(4, 3, generator=seeded(rank))
    torch.testing.assert_close(torch_ep.combine(torch_ep.dispatch(x, plan), plan), 2 * x)


BAD = {
    "plan: alignment": "ValueError: ep::plan: expected a positive alignment, got -1",
    "plan: type": "TypeError: ep::plan: expected topk_idx to be a Tensor, got list",
    "plan: tokens": "ValueError: ep::plan: expected at most max_tokens_per_rank = 8 tokens, got 12",
    "plan: index": "ValueError: ep::plan: expected topk_idx in [-1, 8), got",
    "dispatch: rows": "ValueError: ep::dispatch: expected x of shape [4, hidden]",
    "dispatch: hidden": "DistError: ep::dispatch: expected the same hidden on every rank",
    "combine: rows": "ValueError: ep::combine: expected y of shape",
    "combine: type": "TypeError: ep::combine: expected y to be a Tensor, got NoneType",
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_of_one_rank_reaches_all(case: str) -> None:
    messages = world(4).run(_bad_argument_of_one, case)
    assert messages[1].startswith(BAD[case]), messages[1]
    reason = BAD[case].split(": ", 1)[1]
    for rank in (0, 2, 3):
        assert messages[rank].startswith("DistError: "), messages
        assert reason[:30] in messages[rank], messages


def _levels_of_one_rank(rank: int, world_size: int) -> str:
    """Rank 1 combines inside its node alone, on one level: its node's other rank would take parts for whole rows."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2)
    plan = torch_ep.plan(random_topk(5, 3, 8, seeded(rank), 0), 8)
    rows = torch.ones(plan.num_rows, WIDE)
    message = _message(torch_ep.combine, rows, plan._replace(rail=None) if rank == 1 else plan)
    _equals_layer_of_one_rank(rank, world_size)
    return message


def test_levels_of_one_rank_alone() -> None:
    messages = world(4).run(_levels_of_one_rank)
    assert all("expected the same levels and parts" in message for message in messages), messages
    assert "on rank 0" in messages[2] and "on rank 1" in messages[2]  # global ranks, also in another node


def _working_grid_stays(rank: int, world_size: int) -> list[str]:
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2)
    messages = [
        _message(torch_ep.init, timeout=PATIENCE, ranks_per_node=2, hidden=-1),
        _message(torch_ep.init, timeout=PATIENCE, ranks_per_node=2, hidden=-1 if rank == 2 else None),
    ]
    _equals_layer_of_one_rank(rank, world_size)
    messages.append(_message(torch_ep.init, timeout=PATIENCE, max_relay_rows=4))
    _equals_layer_of_one_rank(rank, world_size)
    torch_ep.init(timeout=PATIENCE)
    return messages


def test_a_bad_argument_of_init_leaves_the_grid_as_it_is() -> None:
    for rank, (all_ranks, one_rank, flat) in enumerate(world(4).run(_working_grid_stays)):
        own = "ValueError: torch_ep.init: expected a positive hidden or None, got -1"
        assert all_ranks == own
        assert one_rank == own if rank == 2 else "rank 2 failed before" in one_rank
        assert "expected ranks_per_node with max_relay_rows, got None" in flat


def _groups_of_a_mesh(rank: int, world_size: int) -> list[str]:
    """Its dimensions, as groups of their own, and another grid."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    torch_ep.init(mesh["local"], timeout=PATIENCE, max_tokens_per_rank=9)
    torch_ep.init(mesh, timeout=PATIENCE, max_tokens_per_rank=4)
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2, max_tokens_per_rank=20)
    idx = torch.zeros(9, 1, dtype=torch.int64)
    messages = [_message(torch_ep.plan, idx, 8, mesh), _message(torch_ep.plan, idx, 8, None)]
    torch_ep.destroy(mesh)
    messages += [_message(torch_ep.plan, idx, 8, mesh["local"]), _message(torch_ep.plan, idx, 8, None)]
    torch_ep.destroy(mesh["local"])
    torch_ep.init(timeout=PATIENCE)
    return messages


def test_a_grid_leaves_other_groups_alone() -> None:
    for messages in world(4).run(_groups_of_a_mesh):
        assert "expected at most max_tokens_per_rank = 4 tokens, got 9" in messages[0]
        assert messages[1:] == ["nothing raised"] * 3


def _groups_after_the_grid_is_gone(rank: int, world_size: int) -> list[int]:
    def count() -> int:
        return len(dist.distributed_c10d._world.pg_map)

    counts = [count()]
    group = dist.new_group()
    torch_ep.init(group, timeout=PATIENCE, ranks_per_node=2)
    counts.append(count())
    torch_ep.destroy(group)
    dist.destroy_process_group(group)
    torch_ep.init(timeout=PATIENCE)
    return [*counts, count()]


def test_the_groups_of_rails_and_nodes_go_with_the_group_of_the_grid() -> None:
    for before, during, after in world(4).run(_groups_after_the_grid_is_gone):
        assert during == before + 3  # the group, a rail and a node
        assert after == before


def _reset_after_a_late_rank(rank: int, world_size: int) -> str:
    torch_ep.init(timeout=short_timeout(), ranks_per_node=2)
    idx = random_topk(4, 2, 8, seeded(rank), 0)
    message = _message(torch_ep.plan, idx, 8) if rank != 1 else ""
    dist.barrier()
    torch_ep.reset()
    _equals_layer_of_one_rank(rank, world_size)
    torch_ep.init(timeout=PATIENCE)
    return message


def test_reset_after_a_rank_that_did_not_come() -> None:
    messages = world(4).run(_reset_after_a_late_rank)
    for rank in (0, 2, 3):
        assert messages[rank].startswith("DistError") and "rank 1" in messages[rank], messages


def _bad_init(rank: int, world_size: int, connected: bool) -> list[str]:
    group = dist.new_group()
    if connected:
        torch_ep.init(group, timeout=PATIENCE)
    messages = [
        _message(torch_ep.init, group, timeout=PATIENCE, ranks_per_node=3 if rank == 2 else 2),
        _message(torch_ep.init, group, timeout=PATIENCE, ranks_per_node=4 if rank == 2 else 2),
        _message(torch_ep.init, group, timeout=PATIENCE, ranks_per_node=2, hidden=5 if rank == 2 else 4),
        _message(torch_ep.init, group, timeout=PATIENCE, ranks_per_node=2 if rank == 2 else None),
    ]
    torch_ep.init(group, timeout=PATIENCE, ranks_per_node=2)
    idx = torch.arange(8)[None]
    x = torch.ones(1, 2)
    plan = torch_ep.plan(idx, 8, group)
    torch.testing.assert_close(torch_ep.combine(torch_ep.dispatch(x, plan), plan), 8 * x)
    torch_ep.destroy(group)
    return messages


@pytest.mark.parametrize("connected", [False, True], ids=["first", "again"])
def test_ranks_that_disagree_in_init(connected: bool) -> None:
    for rank, messages in enumerate(world(4).run(_bad_init, connected)):
        indivisible = "torch_ep.init: expected ranks_per_node to divide the 4 ranks of the group, got 3"
        if rank == 2:
            assert messages[0] == f"ValueError: {indivisible}"
        else:
            assert "rank 2 failed before" in messages[0] and indivisible in messages[0]
        assert "expected the same ranks_per_node on every rank, got 2 on rank 0 and 4 on rank 2" in messages[1]
        assert "expected the same hidden on every rank, got 4 on rank 0 and 5 on rank 2" in messages[2]
        assert messages[3].startswith("DistError: ")


def _rows_return(group: Any) -> None:
    x = torch.arange(16.0).view(8, 2)
    plan = torch_ep.plan(torch.arange(8)[:, None], 8, group)
    torch.testing.assert_close(torch_ep.combine(torch_ep.dispatch(x, plan), plan), x)


def _in_more_groups_than_others(rank: int, world_size: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1, 2])]
    twin = grid.group_of_same_ranks(dist.group.WORLD, "gloo", PATIENCE)
    numbers = torch.ones(1)
    dist.all_reduce(numbers, group=twin)
    assert numbers.item() == world_size
    groups.append(twin)
    for _ in range(3):
        group = dist.new_group()
        torch_ep.init(group, timeout=PATIENCE, ranks_per_node=2)
        _rows_return(group)
        torch_ep.destroy(group)
        dist.destroy_process_group(group)
        mesh = init_device_mesh("cpu", (2, 2))
        torch_ep.init(mesh, timeout=PATIENCE)
        _rows_return(mesh)
        torch_ep.destroy(mesh)
        for dimension in range(2):
            dist.destroy_process_group(mesh.get_group(dimension))
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def test_grids_are_made_whatever_other_groups_a_rank_is_in() -> None:
    """Also where groups of the same ranks were there before, whose addresses the store still has."""
    world(4).run(_in_more_groups_than_others)


def _relay_overflow(rank: int, world_size: int) -> list[Any]:
    """All tokens of both nodes come to node 0, whose relays have room for 5 rows."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2, max_relay_rows=5)
    idx = torch.zeros(4, 1, dtype=torch.int64)
    dropped = torch_ep.plan(idx, 8, capacity=32).num_dropped.item()
    message = _message(torch_ep.plan, idx, 8)
    # The other node learns of it in its next exchange.
    late = _message(torch_ep.plan, torch.full_like(idx, 7), 8) if rank >= 2 else ""
    torch_ep.init(timeout=PATIENCE)
    return [dropped, message, late]


def test_more_rows_than_a_relay_holds() -> None:
    results = world(4).run(_relay_overflow)
    assert [dropped for dropped, _, _ in results] == [3, 3, 0, 0]
    for _, message, _ in results[:2]:
        assert "expected at most max_relay_rows = 5 rows from all nodes for one rank to relay, got 8" in message
    for _, message, late in results[2:]:
        assert message == "nothing raised"
        assert "expected at most max_relay_rows = 5 rows from all nodes for one rank to relay, got 8" in late


class _Layer(torch.nn.Module):
    def forward(self, x: Tensor, w: Tensor, idx: Tensor) -> Tensor:
        return _layer(x, w, idx, 8, None, "expert_major")


def _saved_and_exported(rank: int, world_size: int) -> None:
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2, max_tokens_per_rank=32)
    idx = random_topk(6, 3, 8, seeded(rank))
    x, w = torch.randn(6, 4, generator=seeded(rank)), torch.rand(6, 3, generator=seeded(rank, 1))
    plan = torch_ep.plan(idx, 8)
    file = io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(torch_ep.dispatch(x, loaded), torch_ep.dispatch(x, plan))
    program = torch.export.export(_Layer(), (x, w, idx), strict=False)
    assert torch.equal(program.module()(x, w, idx), _Layer()(x, w, idx))
    # Selective checkpointing recomputes the experts, and no exchange: the other ranks make none.
    leaf = x.clone().requires_grad_()
    out = checkpoint(_Layer(), leaf, w, idx, use_reentrant=False, context_fn=torch_ep.checkpoint_contexts)
    begun = torch_ep._C.exchanges_begun()
    out.sum().backward()
    assert torch_ep._C.exchanges_begun() - begun == 4  # the backward of two exchanges, on two levels each
    torch_ep.init(timeout=PATIENCE)


def test_plans_are_saved_exported_and_checkpointed() -> None:
    world(4).run(_saved_and_exported)


def _node_limited(rank: int, world_size: int) -> None:
    """With routing limited to one of two nodes, a token's row leaves for one node alone."""
    torch_ep.init(timeout=PATIENCE, ranks_per_node=2)
    scores = torch.rand(16, 8, generator=seeded(rank))
    idx = torch_ep.nn.group_limited_topk(scores, 3, num_expert_groups=2, num_topk_groups=1)
    plan = torch_ep.plan(idx, 8)
    assert plan.rail.send_counts.sum() == 16
    torch_ep.init(timeout=PATIENCE)


def test_node_limited_routing_sends_a_row_to_few_nodes() -> None:
    world(4).run(_node_limited)


def test_a_grid_wants_init() -> None:
    for messages in world(4).run(_without_init):
        assert "expected an initialized DeviceMesh, got one of 2 nodes of 2 ranks: call torch_ep.init(mesh)" in messages


def _without_init(rank: int, world_size: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    return _message(torch_ep.plan, torch.zeros(1, 1, dtype=torch.int64), 8, mesh)
