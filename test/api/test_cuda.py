"""The operators on CUDA tensors by backend c10d, over NCCL where there are several GPUs: equal to the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.harness import World, random_topk, seeded

import torch_ep
from torch_ep import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BACKENDS = {"nccl": "cuda:nccl", "gloo-nccl": "cpu:gloo,cuda:nccl"}  # headers over NCCL, or over gloo


@pytest.fixture(scope="module", params=BACKENDS.values(), ids=BACKENDS)
def gpus(request: pytest.FixtureRequest) -> Iterator[World]:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU: several ranks over NCCL need several")
    own = World(count, c10d_backend=request.param, backend="c10d")
    yield own
    own.close()


def equals_reference(rank: int, world_size: int, seed: int, capacity: int | None) -> None:
    num_topk, num_experts, hidden = 3, 4 * world_size, 24
    g = seeded(seed)
    tokens = [int(torch.randint(0, 40, (), generator=g)) for _ in range(world_size)]
    tokens[seed % world_size] = 0
    idx = [random_topk(n, num_topk, num_experts, g) for n in tokens]
    w = [torch.rand(n, num_topk, generator=g) for n in tokens]
    for layout, alignment in (("rank_major", 1), ("expert_major", 8)):
        options = {"layout": layout, "alignment": alignment, "capacity": capacity}
        plans = reference.plan(idx, num_experts, **options)
        p = torch_ep.plan(idx[rank].cuda(), num_experts, **options)
        for field, got in zip(p._fields, p, strict=True):
            if isinstance(got, torch.Tensor):
                assert torch.equal(got.cpu(), getattr(plans[rank], field)), field
        for dtype in (torch.float32, torch.bfloat16):
            x = [torch.randn(n, hidden, generator=g).to(dtype) for n in tokens]
            own = x[rank].cuda().requires_grad_()
            rows, weights = torch_ep.dispatch(own, p, topk_weights=w[rank].cuda())
            want = reference.dispatch(x, plans, topk_weights=w)
            assert torch.equal(rows.cpu(), want[rank][0])
            assert torch.equal(weights.cpu(), want[rank][1])
            sums = torch_ep.combine(rows, p)
            want_sums = reference.combine([r for r, _ in want], plans)[rank][0]
            assert torch.equal(sums.cpu(), want_sums)
            sums.backward(own.detach())  # (D^T D)^T applied to x is D^T D x again
            assert torch.equal(own.grad.cpu(), want_sums)


@pytest.mark.parametrize("capacity", [None, 16, 512])
@pytest.mark.parametrize("seed", range(3))
def test_several_gpus_equal_the_reference(gpus: World, seed: int, capacity: int | None) -> None:
    gpus.run(equals_reference, seed, capacity)


def wrong_order(rank: int, world_size: int) -> str:
    idx = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    p = torch_ep.plan(idx, world_size)
    x = torch.ones(2, 4, device="cuda")
    try:
        if rank == 0:
            torch_ep.plan(idx, world_size)
        else:
            torch_ep.dispatch(x, p)
    except Exception as error:
        equals_reference(rank, world_size, 7, None)
        return str(error)
    return "no error"


def test_different_sequences_name_both(gpus: World) -> None:
    for message in gpus.run(wrong_order):
        assert "ep::plan (exchange" in message
        assert "ep::dispatch (exchange" in message


@pytest.mark.parametrize("capacity", [None, 16, 512])
def test_one_gpu_equals_the_reference(capacity: int | None) -> None:
    equals_reference(0, 1, 3, capacity)


def test_moe_layer_equals_the_cpu() -> None:
    torch.manual_seed(0)
    layer = torch_ep.nn.MoE(32, 48, 8, 2, shared_intermediate=16, group="")
    x = torch.randn(50, 32)
    want, _ = layer(x)
    got, _ = layer.cuda()(x.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)


def test_moe_layer_compiles_whole() -> None:
    torch.manual_seed(0)
    layer = torch_ep.nn.MoE(32, 48, 8, 2, group="").cuda()
    x = torch.randn(50, 32, device="cuda", requires_grad=True)
    want, _ = layer(x)
    (want_grad,) = torch.autograd.grad(want.square().sum(), x)
    got, _ = torch.compile(layer, fullgraph=True)(x)
    (got_grad,) = torch.autograd.grad(got.square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-4)
