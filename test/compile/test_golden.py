# ruff: noqa: E501 - graphs are as wide as they are
"""The graphs of a MoE layer and of a decoding step, in full: what a change of the operators, of the layer or of torch does to them.

The same text on torch 2.11 to 2.13. After a wanted change: `EXPECTTEST_ACCEPT=1 pytest test/compile/test_golden.py`.
"""

from __future__ import annotations

import itertools
import re
import unittest
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from expecttest import TestCase
from support.devices import Ranks, needs_cuda, one_rank_on
from support.harness import world
from torch._dynamo.testing import AotEagerAndRecordGraphs, normalize_gm
from torch.fx import GraphModule

import torch_ep

HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 8, 4, 4, 2
# The operators' lines are the same there, as TestTwoRanks sees.
before_2_14 = unittest.skipIf(torch.__version__ >= "2.14", "this torch keeps fewer sizes, and has another clamp_min")


def text(gm: GraphModule) -> str:
    """Without paths, and without the places where variables are freed."""
    return re.sub(r";  [^;\n]* = None$", "", normalize_gm(gm.print_readable(print_output=False)), flags=re.MULTILINE)


def graphs_of(layout: str, count: int = 5, device: str = "cpu", overlap: int = 0) -> tuple[str, str, str]:
    """Dynamo, forward, backward of a layer in the default group."""
    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    layer = torch_ep.nn.MoE(
        HIDDEN, INTERMEDIATE, EXPERTS, TOPK, layout=layout, normalize=False, overlap=overlap, device=device
    )
    x = torch.randn(count, HIDDEN, requires_grad=True, device=device)
    y, stats = torch.compile(layer, fullgraph=True, backend=backend)(x)
    (y.sum() + stats.aux_loss).backward()
    torch._dynamo.reset()
    return text(backend.graphs[0]), text(backend.fw_graphs[0]), text(backend.bw_graphs[0])


def only_operators(graph: str) -> str:
    """The lines that have to do with torch_ep."""
    return "\n".join(line.strip() for line in graph.splitlines() if "torch.ops.ep." in line)


def _graphs_on_ranks(rank: int, world_size: int, layout: str) -> list[str]:
    return [only_operators(graph) for graph in graphs_of(layout, count=5 + rank)]


class TestOneRank(TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.dynamo, cls.forward, cls.backward = graphs_of("expert_major")

    def test_dynamo(self) -> None:
        self.assertExpectedInline(
            self.dynamo,
            """\
class GraphModule(torch.nn.Module):
    def forward(self, L_x_: "f32[5, 8]", L_self_parameters_router_: "f32[4, 8]", L_self_parameters_gate_proj_: "f32[4, 8, 4]", L_self_parameters_up_proj_: "f32[4, 8, 4]", L_self_parameters_down_proj_: "f32[4, 4, 8]"):
        l_x_ = L_x_
        l_self_parameters_router_ = L_self_parameters_router_
        l_self_parameters_gate_proj_ = L_self_parameters_gate_proj_
        l_self_parameters_up_proj_ = L_self_parameters_up_proj_
        l_self_parameters_down_proj_ = L_self_parameters_down_proj_

        tokens: "f32[5, 8]" = l_x_.reshape(-1, 8)

        to: "f32[5, 8]" = tokens.to(torch.float32)
        to_1: "f32[4, 8]" = l_self_parameters_router_.to(torch.float32)
        logits: "f32[5, 4]" = torch._C._nn.linear(to, to_1)

        scores: "f32[5, 4]" = logits.softmax(-1)

        detach: "f32[5, 4]" = scores.detach()
        topk = detach.topk(2, dim = -1)
        topk_idx: "i64[5, 2]" = topk[1]

        weights: "f32[5, 2]" = scores.gather(1, topk_idx)

        weights_1: "f32[5, 2]" = weights * 1.0

        flat: "i64[10]" = topk_idx.flatten()

        zeros: "i64[4]" = torch.zeros(4, dtype = torch.int64, device = device(type='cpu'))

        ones_like: "i64[10]" = torch.ones_like(flat)

        load: "i64[4]" = zeros.scatter_add(0, flat, ones_like)

        sum_1: "f32[5, 1]" = scores.sum(-1, keepdim = True)
        clamp_min: "f32[5, 1]" = sum_1.clamp_min(1e-20)
        shares: "f32[5, 4]" = scores / clamp_min

        sum_2: "i64[]" = load.sum()
        clamp_min_1: "i64[]" = sum_2.clamp_min(1)
        to_2: "f32[]" = clamp_min_1.to(torch.float32)
        tokens_1: "f32[]" = to_2 / 2

        to_3: "f32[4]" = load.to(torch.float32)
        truediv_2: "f32[4]" = to_3 / 2
        truediv_3: "f32[4]" = truediv_2 / tokens_1
        sum_3: "f32[4]" = shares.sum(0)
        truediv_4: "f32[4]" = sum_3 / tokens_1
        mul_1: "f32[4]" = truediv_3 * truediv_4
        sum_4: "f32[]" = mul_1.sum()
        aux_loss: "f32[]" = 4 * sum_4

        plan = torch.ops.ep.plan(topk_idx, 4, 'expert_major', 1, 1, '', None, None)
        getitem_11: "i32[u0]" = plan[3]
        sym_size_int: "Sym(u0)" = torch.ops.aten.sym_size.int(getitem_11, 0)
        ge: "Sym(u0 >= 0)" = sym_size_int >= 0
        _assert_scalar_default = torch.ops.aten._assert_scalar.default(ge, "Runtime assertion failed for expression u0 >= 0 on node 'ge'")
        le: "Sym(u0 <= 10)" = sym_size_int <= 10
        _assert_scalar_default_1 = torch.ops.aten._assert_scalar.default(le, "Runtime assertion failed for expression u0 <= 10 on node 'le'")
        send_row: "i32[5, 2]" = plan[0]
        send_counts: "i32[1]" = plan[1]
        recv_counts: "i32[1]" = plan[2]
        recv_map: "i32[u0]" = plan[3]
        offsets: "i32[4]" = plan[4]
        num_dropped: "i32[]" = plan[6]

        dispatch = torch.ops.ep.dispatch(tokens, weights_1, None, send_row, send_counts, recv_counts, recv_map, 'expert_major', '', None)
        rows: "f32[u0, 8]" = dispatch[0]
        weights_2: "f32[u0]" = dispatch[1]

        grouped_mm: "f32[u0, 4]" = torch.ops.ep.grouped_mm(rows, l_self_parameters_gate_proj_, offsets)

        silu: "f32[u0, 4]" = torch.nn.functional.silu(grouped_mm)

        grouped_mm_1: "f32[u0, 4]" = torch.ops.ep.grouped_mm(rows, l_self_parameters_up_proj_, offsets)

        inner: "f32[u0, 4]" = silu * grouped_mm_1

        value: "f32[u0, 8]" = torch.ops.ep.grouped_mm(inner, l_self_parameters_down_proj_, offsets)

        y: "f32[5, 8]" = torch.ops.ep.combine.weighted(value, weights_2, send_row, send_counts, recv_counts, recv_map, 'expert_major', '', None)

        view: "f32[5, 8]" = y.view((5, 8))
        return (view, aux_loss, load, num_dropped)
""",
        )

    @before_2_14
    def test_aot_forward(self) -> None:
        self.assertExpectedInline(
            self.forward,
            """\
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[5, 8]", primals_2: "f32[4, 8]", primals_3: "f32[4, 8, 4]", primals_4: "f32[4, 8, 4]", primals_5: "f32[4, 4, 8]"):
        view: "f32[5, 8]" = torch.ops.aten.view.default(primals_1, [-1, 8])

        t: "f32[8, 4]" = torch.ops.aten.t.default(primals_2)
        mm: "f32[5, 4]" = torch.ops.aten.mm.default(view, t)

        _softmax: "f32[5, 4]" = torch.ops.aten._softmax.default(mm, -1, False)
        detach: "f32[5, 4]" = torch.ops.aten.detach.default(_softmax)

        topk = torch.ops.aten.topk.default(detach, 2)
        getitem_1: "i64[5, 2]" = topk[1]

        gather: "f32[5, 2]" = torch.ops.aten.gather.default(_softmax, 1, getitem_1)

        mul: "f32[5, 2]" = torch.ops.aten.mul.Tensor(gather, 1.0)

        view_1: "i64[10]" = torch.ops.aten.view.default(getitem_1, [10])

        zeros: "i64[4]" = torch.ops.aten.zeros.default([4], dtype = torch.int64, device = device(type='cpu'), pin_memory = False)

        ones_like: "i64[10]" = torch.ops.aten.ones_like.default(view_1, pin_memory = False)

        scatter_add: "i64[4]" = torch.ops.aten.scatter_add.default(zeros, 0, view_1, ones_like)

        sum_1: "f32[5, 1]" = torch.ops.aten.sum.dim_IntList(_softmax, [-1], True)
        clamp_min: "f32[5, 1]" = torch.ops.aten.clamp_min.default(sum_1, 1e-20)
        div: "f32[5, 4]" = torch.ops.aten.div.Tensor(_softmax, clamp_min)

        sum_2: "i64[]" = torch.ops.aten.sum.default(scatter_add)
        clamp_min_1: "i64[]" = torch.ops.aten.clamp_min.default(sum_2, 1)
        _to_copy: "f32[]" = torch.ops.aten._to_copy.default(clamp_min_1, dtype = torch.float32)
        div_1: "f32[]" = torch.ops.aten.div.Tensor(_to_copy, 2)

        _to_copy_1: "f32[4]" = torch.ops.aten._to_copy.default(scatter_add, dtype = torch.float32)
        div_2: "f32[4]" = torch.ops.aten.div.Tensor(_to_copy_1, 2)
        div_3: "f32[4]" = torch.ops.aten.div.Tensor(div_2, div_1)
        sum_3: "f32[4]" = torch.ops.aten.sum.dim_IntList(div, [0])
        div_4: "f32[4]" = torch.ops.aten.div.Tensor(sum_3, div_1)
        mul_1: "f32[4]" = torch.ops.aten.mul.Tensor(div_3, div_4)
        sum_4: "f32[]" = torch.ops.aten.sum.default(mul_1)
        mul_2: "f32[]" = torch.ops.aten.mul.Tensor(sum_4, 4)

        plan = torch.ops.ep.plan.default(getitem_1, 4, 'expert_major', 1, 1, '')
        getitem_2: "i32[5, 2]" = plan[0]
        getitem_3: "i32[1]" = plan[1]
        getitem_4: "i32[1]" = plan[2]
        getitem_5: "i32[u0]" = plan[3]
        getitem_6: "i32[4]" = plan[4]
        getitem_8: "i32[]" = plan[6]
        sym_size_int: "Sym(u0)" = torch.ops.aten.sym_size.int(getitem_5, 0)
        ge: "Sym(u0 >= 0)" = sym_size_int >= 0
        _assert_scalar = torch.ops.aten._assert_scalar.default(ge, "Runtime assertion failed for expression u0 >= 0 on node 'ge'")
        le: "Sym(u0 <= 10)" = sym_size_int <= 10
        _assert_scalar_1 = torch.ops.aten._assert_scalar.default(le, "Runtime assertion failed for expression u0 <= 10 on node 'le'")

        dispatch = torch.ops.ep.dispatch.default(view, mul, None, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')
        getitem_9: "f32[u0, 8]" = dispatch[0]
        getitem_10: "f32[u0]" = dispatch[1]

        grouped_mm: "f32[u0, 4]" = torch.ops.ep.grouped_mm.default(getitem_9, primals_3, getitem_6)

        silu: "f32[u0, 4]" = torch.ops.aten.silu.default(grouped_mm)

        grouped_mm_1: "f32[u0, 4]" = torch.ops.ep.grouped_mm.default(getitem_9, primals_4, getitem_6)

        mul_13: "f32[u0, 4]" = torch.ops.aten.mul.Tensor(silu, grouped_mm_1)

        grouped_mm_2: "f32[u0, 8]" = torch.ops.ep.grouped_mm.default(mul_13, primals_5, getitem_6)

        combine: "f32[5, 8]" = torch.ops.ep.combine.weighted(grouped_mm_2, getitem_10, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')

        view_2: "f32[5, 8]" = torch.ops.aten.view.default(combine, [5, 8])

        detach_2: "f32[5, 4]" = torch.ops.aten.detach.default(detach)
        return (view_2, mul_2, scatter_add, getitem_8, primals_2, primals_3, primals_4, primals_5, view, _softmax, getitem_1, div_1, div_3, getitem_2, getitem_3, getitem_4, getitem_5, getitem_6, getitem_9, getitem_10, grouped_mm, grouped_mm_1, mul_13, grouped_mm_2, detach_2, sym_size_int)
""",
        )

    @before_2_14
    def test_aot_backward(self) -> None:
        self.assertExpectedInline(
            self.backward,
            """\
class GraphModule(torch.nn.Module):
    def forward(self, sym_size_int: "Sym(u0)", primals_2: "f32[4, 8]", primals_3: "f32[4, 8, 4]", primals_4: "f32[4, 8, 4]", primals_5: "f32[4, 4, 8]", view: "f32[5, 8]", _softmax: "f32[5, 4]", getitem_1: "i64[5, 2]", div_1: "f32[]", div_3: "f32[4]", getitem_2: "i32[5, 2]", getitem_3: "i32[1]", getitem_4: "i32[1]", getitem_5: "i32[u0]", getitem_6: "i32[4]", getitem_9: "f32[u0, 8]", getitem_10: "f32[u0]", grouped_mm: "f32[u0, 4]", grouped_mm_1: "f32[u0, 4]", mul_13: "f32[u0, 4]", grouped_mm_2: "f32[u0, 8]", detach_2: "f32[5, 4]", tangents_1: "f32[5, 8]", tangents_2: "f32[]"):
        view_3: "f32[5, 8]" = torch.ops.aten.view.default(tangents_1, [5, 8])

        dispatch_1 = torch.ops.ep.dispatch.default(view_3, None, None, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')
        getitem_12: "f32[u0, 8]" = dispatch_1[0]
        ge_1: "b8[u0]" = torch.ops.aten.ge.Scalar(getitem_5, 0)
        unsqueeze: "b8[u0, 1]" = torch.ops.aten.unsqueeze.default(ge_1, 1)
        unsqueeze_1: "f32[u0, 1]" = torch.ops.aten.unsqueeze.default(getitem_10, 1)
        mul_18: "f32[u0, 8]" = torch.ops.aten.mul.Tensor(getitem_12, unsqueeze_1)
        scalar_tensor: "f32[]" = torch.ops.aten.scalar_tensor.default(0, dtype = torch.float32, layout = torch.strided, device = device(type='cpu'))
        where: "f32[u0, 8]" = torch.ops.aten.where.self(unsqueeze, mul_18, scalar_tensor)
        mul_19: "f32[u0, 8]" = torch.ops.aten.mul.Tensor(getitem_12, grouped_mm_2)
        where_1: "f32[u0, 8]" = torch.ops.aten.where.self(unsqueeze, mul_19, scalar_tensor)
        sum_5: "f32[u0]" = torch.ops.aten.sum.dim_IntList(where_1, [1])

        transpose: "f32[4, 8, 4]" = torch.ops.aten.transpose.int(primals_5, 1, 2)
        grouped_mm_3: "f32[u0, 4]" = torch.ops.ep.grouped_mm.default(where, transpose, getitem_6)
        grouped_mm_4: "f32[4, 4, 8]" = torch.ops.ep.grouped_mm.transpose(mul_13, where, getitem_6)

        silu: "f32[u0, 4]" = torch.ops.aten.silu.default(grouped_mm)
        mul_20: "f32[u0, 4]" = torch.ops.aten.mul.Tensor(grouped_mm_3, silu)
        mul_21: "f32[u0, 4]" = torch.ops.aten.mul.Tensor(grouped_mm_3, grouped_mm_1)

        transpose_1: "f32[4, 4, 8]" = torch.ops.aten.transpose.int(primals_4, 1, 2)
        grouped_mm_5: "f32[u0, 8]" = torch.ops.ep.grouped_mm.default(mul_20, transpose_1, getitem_6)
        grouped_mm_6: "f32[4, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_9, mul_20, getitem_6)

        silu_backward: "f32[u0, 4]" = torch.ops.aten.silu_backward.default(mul_21, grouped_mm)

        transpose_2: "f32[4, 4, 8]" = torch.ops.aten.transpose.int(primals_3, 1, 2)
        grouped_mm_7: "f32[u0, 8]" = torch.ops.ep.grouped_mm.default(silu_backward, transpose_2, getitem_6)
        grouped_mm_8: "f32[4, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_9, silu_backward, getitem_6)
        add_22: "f32[u0, 8]" = torch.ops.aten.add.Tensor(grouped_mm_5, grouped_mm_7)

        combine_1 = torch.ops.ep.combine.default(add_22, sum_5, None, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')
        getitem_15: "f32[5, 8]" = combine_1[0]
        getitem_16: "f32[5, 2]" = combine_1[1]

        mul_22: "f32[]" = torch.ops.aten.mul.Tensor(tangents_2, 4)
        expand: "f32[4]" = torch.ops.aten.expand.default(mul_22, [4])
        mul_23: "f32[4]" = torch.ops.aten.mul.Tensor(expand, div_3)
        div_5: "f32[4]" = torch.ops.aten.div.Tensor(mul_23, div_1)
        unsqueeze_3: "f32[1, 4]" = torch.ops.aten.unsqueeze.default(div_5, 0)
        expand_1: "f32[5, 4]" = torch.ops.aten.expand.default(unsqueeze_3, [5, 4])

        sum_1: "f32[5, 1]" = torch.ops.aten.sum.dim_IntList(_softmax, [-1], True)
        clamp_min: "f32[5, 1]" = torch.ops.aten.clamp_min.default(sum_1, 1e-20)
        div: "f32[5, 4]" = torch.ops.aten.div.Tensor(_softmax, clamp_min)
        div_7: "f32[5, 4]" = torch.ops.aten.div.Tensor(div, clamp_min)
        neg: "f32[5, 4]" = torch.ops.aten.neg.default(expand_1)
        mul_24: "f32[5, 4]" = torch.ops.aten.mul.Tensor(neg, div_7)
        div_8: "f32[5, 4]" = torch.ops.aten.div.Tensor(expand_1, clamp_min)
        sum_6: "f32[5, 1]" = torch.ops.aten.sum.dim_IntList(mul_24, [1], True)
        scalar_tensor_2: "f32[]" = torch.ops.aten.scalar_tensor.default(0.0, dtype = torch.float32, layout = torch.strided, device = device(type='cpu'))
        ge_2: "b8[5, 1]" = torch.ops.aten.ge.Scalar(sum_1, 1e-20)
        where_2: "f32[5, 1]" = torch.ops.aten.where.self(ge_2, sum_6, scalar_tensor_2)
        expand_2: "f32[5, 4]" = torch.ops.aten.expand.default(where_2, [5, 4])
        add_23: "f32[5, 4]" = torch.ops.aten.add.Tensor(div_8, expand_2)

        mul_25: "f32[5, 2]" = torch.ops.aten.mul.Tensor(getitem_16, 1.0)

        new_zeros: "f32[5, 4]" = torch.ops.aten.new_zeros.default(mul_25, [5, 4])
        scatter_add_1: "f32[5, 4]" = torch.ops.aten.scatter_add.default(new_zeros, 1, getitem_1, mul_25)
        add_24: "f32[5, 4]" = torch.ops.aten.add.Tensor(add_23, scatter_add_1)

        _softmax_backward_data: "f32[5, 4]" = torch.ops.aten._softmax_backward_data.default(add_24, detach_2, -1, torch.float32)

        t_1: "f32[4, 5]" = torch.ops.aten.t.default(_softmax_backward_data)
        mm_1: "f32[4, 8]" = torch.ops.aten.mm.default(t_1, view)
        t_2: "f32[8, 4]" = torch.ops.aten.t.default(mm_1)
        t: "f32[8, 4]" = torch.ops.aten.t.default(primals_2)
        t_3: "f32[4, 8]" = torch.ops.aten.t.default(t)
        mm_2: "f32[5, 8]" = torch.ops.aten.mm.default(_softmax_backward_data, t_3)
        add_25: "f32[5, 8]" = torch.ops.aten.add.Tensor(getitem_15, mm_2)
        t_4: "f32[4, 8]" = torch.ops.aten.t.default(t_2)

        view_4: "f32[5, 8]" = torch.ops.aten.view.default(add_25, [5, 8])
        return (view_4, t_4, grouped_mm_8, grouped_mm_6, grouped_mm_4)
""",
        )


class TestHalves(TestCase):
    maxDiff = None

    def test_operators(self) -> None:
        graphs = graphs_of("expert_major", overlap=2)
        dynamo, forward, backward = (only_operators(graph) for graph in graphs)
        self.assertExpectedInline(
            dynamo,
            """\
plan = torch.ops.ep.plan(value, 4, 'expert_major', 1, 1, '', None, None)
last: "f64[1]" = torch.ops.ep.dispatch_send(value_1, value_2, None, send_row, send_counts, recv_counts, recv_map, 'expert_major', '', None)
plan_1 = torch.ops.ep.plan(value_3, 4, 'expert_major', 1, 1, '', None, last)
last_1: "f64[1]" = torch.ops.ep.dispatch_send(value_4, value_5, None, send_row_1, send_counts_1, recv_counts_1, recv_map_1, 'expert_major', '', last)
dispatch_recv = torch.ops.ep.dispatch_recv(last, send_row, send_counts, recv_counts, recv_map, 'expert_major', '', 8, torch.float32, torch.float32, None, None, last_1)
grouped_mm: "f32[u0, 4]" = torch.ops.ep.grouped_mm(rows, l_self_parameters_gate_proj_, offsets)
grouped_mm_1: "f32[u0, 4]" = torch.ops.ep.grouped_mm(rows, l_self_parameters_up_proj_, offsets)
value_6: "f32[u0, 8]" = torch.ops.ep.grouped_mm(inner, l_self_parameters_down_proj_, offsets)
last_2: "f64[1]" = torch.ops.ep.combine_send.weighted(value_6, weights_2, send_row, send_counts, recv_counts, recv_map, 'expert_major', '', None)
dispatch_recv_1 = torch.ops.ep.dispatch_recv(last_1, send_row_1, send_counts_1, recv_counts_1, recv_map_1, 'expert_major', '', 8, torch.float32, torch.float32, None, None, last_2)
grouped_mm_3: "f32[u1, 4]" = torch.ops.ep.grouped_mm(rows_1, l_self_parameters_gate_proj_, offsets_1)
grouped_mm_4: "f32[u1, 4]" = torch.ops.ep.grouped_mm(rows_1, l_self_parameters_up_proj_, offsets_1)
value_7: "f32[u1, 8]" = torch.ops.ep.grouped_mm(inner_1, l_self_parameters_down_proj_, offsets_1)
last_3: "f64[1]" = torch.ops.ep.combine_send.weighted(value_7, weights_3, send_row_1, send_counts_1, recv_counts_1, recv_map_1, 'expert_major', '', None)
combine_recv = torch.ops.ep.combine_recv(last_2, send_row, send_counts, recv_counts, recv_map, 'expert_major', '', 8, torch.float32, None, None, None, last_3)
combine_recv_1 = torch.ops.ep.combine_recv(last_3, send_row_1, send_counts_1, recv_counts_1, recv_map_1, 'expert_major', '', 8, torch.float32, None, None, None, tokens_2)""",
        )
        self.assertExpectedInline(
            forward,
            """\
plan = torch.ops.ep.plan.default(slice_3, 4, 'expert_major', 1, 1, '')
dispatch_send: "f64[1]" = torch.ops.ep.dispatch_send.default(slice_1, slice_5, None, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')
plan_1 = torch.ops.ep.plan.default(slice_4, 4, 'expert_major', 1, 1, '', None, dispatch_send)
dispatch_send_1: "f64[1]" = torch.ops.ep.dispatch_send.default(slice_2, slice_6, None, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '', dispatch_send)
dispatch_recv = torch.ops.ep.dispatch_recv.default(dispatch_send, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '', 8, torch.float32, torch.float32, None, None, dispatch_send_1)
grouped_mm: "f32[u0, 4]" = torch.ops.ep.grouped_mm.default(getitem_16, primals_3, getitem_6)
grouped_mm_1: "f32[u0, 4]" = torch.ops.ep.grouped_mm.default(getitem_16, primals_4, getitem_6)
grouped_mm_2: "f32[u0, 8]" = torch.ops.ep.grouped_mm.default(mul_14, primals_5, getitem_6)
combine_send: "f64[1]" = torch.ops.ep.combine_send.weighted(grouped_mm_2, getitem_17, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')
dispatch_recv_1 = torch.ops.ep.dispatch_recv.default(dispatch_send_1, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '', 8, torch.float32, torch.float32, None, None, combine_send)
grouped_mm_3: "f32[u1, 4]" = torch.ops.ep.grouped_mm.default(getitem_19, primals_3, getitem_13)
grouped_mm_4: "f32[u1, 4]" = torch.ops.ep.grouped_mm.default(getitem_19, primals_4, getitem_13)
grouped_mm_5: "f32[u1, 8]" = torch.ops.ep.grouped_mm.default(mul_28, primals_5, getitem_13)
combine_send_1: "f64[1]" = torch.ops.ep.combine_send.weighted(grouped_mm_5, getitem_20, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '')
combine_recv = torch.ops.ep.combine_recv.default(combine_send, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '', 8, torch.float32, None, None, None, combine_send_1)
combine_recv_1 = torch.ops.ep.combine_recv.default(combine_send_1, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '', 8, torch.float32, None, None, None, getitem_22)""",
        )
        self.assertExpectedInline(
            backward,
            """\
dispatch_send_2: "f64[1]" = torch.ops.ep.dispatch_send.default(slice_8, None, None, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '')
zero_after: "f64[]" = torch.ops.ep.zero_after.default(dispatch_send_2)
dispatch_send_3: "f64[1]" = torch.ops.ep.dispatch_send.default(add_45, None, None, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')
zero_after_1: "f64[]" = torch.ops.ep.zero_after.default(dispatch_send_3)
dispatch_recv_2 = torch.ops.ep.dispatch_recv.default(add_46, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '', 8, torch.float32, None, None, None)
grouped_mm_6: "f32[u1, 4]" = torch.ops.ep.grouped_mm.default(where, transpose, getitem_13)
grouped_mm_7: "f32[4, 4, 8]" = torch.ops.ep.grouped_mm.transpose(mul_28, where, getitem_13)
grouped_mm_8: "f32[u1, 8]" = torch.ops.ep.grouped_mm.default(mul_35, transpose_1, getitem_13)
grouped_mm_9: "f32[4, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_19, mul_35, getitem_13)
grouped_mm_10: "f32[u1, 8]" = torch.ops.ep.grouped_mm.default(silu_backward, transpose_2, getitem_13)
grouped_mm_11: "f32[4, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_19, silu_backward, getitem_13)
combine_send_2: "f64[1]" = torch.ops.ep.combine_send.default(add_47, sum_5, None, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '')
zero_after_2: "f64[]" = torch.ops.ep.zero_after.default(combine_send_2)
dispatch_recv_3 = torch.ops.ep.dispatch_recv.default(add_48, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '', 8, torch.float32, None, None, None)
grouped_mm_12: "f32[u0, 4]" = torch.ops.ep.grouped_mm.default(where_2, transpose, getitem_6)
grouped_mm_13: "f32[4, 4, 8]" = torch.ops.ep.grouped_mm.transpose(mul_14, where_2, getitem_6)
grouped_mm_14: "f32[u0, 8]" = torch.ops.ep.grouped_mm.default(mul_39, transpose_1, getitem_6)
grouped_mm_15: "f32[4, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_16, mul_39, getitem_6)
grouped_mm_16: "f32[u0, 8]" = torch.ops.ep.grouped_mm.default(silu_backward_1, transpose_2, getitem_6)
grouped_mm_17: "f32[4, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_16, silu_backward_1, getitem_6)
combine_send_3: "f64[1]" = torch.ops.ep.combine_send.default(add_51, sum_6, None, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '')
zero_after_3: "f64[]" = torch.ops.ep.zero_after.default(combine_send_3)
combine_recv_2 = torch.ops.ep.combine_recv.default(add_53, getitem_9, getitem_10, getitem_11, getitem_12, 'expert_major', '', 8, torch.float32, torch.float32, None, None)
zero_after_4: "f32[]" = torch.ops.ep.zero_after.default(getitem_34)
combine_recv_3 = torch.ops.ep.combine_recv.default(add_54, getitem_2, getitem_3, getitem_4, getitem_5, 'expert_major', '', 8, torch.float32, torch.float32, None, None)""",
        )


class TestTwoRanks(TestCase):
    """The group's name and size are in the graph as constants; sizes of other ranks are not."""

    maxDiff = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.ranks = world(2).run(_graphs_on_ranks, "rank_major")

    def test_dynamo(self) -> None:
        self.assertExpectedInline(
            self.ranks[0][0],
            """\
plan = torch.ops.ep.plan(topk_idx, 4, 'rank_major', 1, 2, '0', None, None)
dispatch = torch.ops.ep.dispatch(tokens, weights_1, None, send_row, send_counts, recv_counts, recv_map, 'rank_major', '0', None)
plan_1 = torch.ops.ep.plan(recv_map, 2, 'expert_major', 1, 1, '', None, None)
dispatch_1 = torch.ops.ep.dispatch(rows, weights_2, None, send_row_1, send_counts_1, recv_counts_1, recv_map_1, 'expert_major', '', None)
grouped_mm: "f32[u1, 4]" = torch.ops.ep.grouped_mm(rows_1, l_self_parameters_gate_proj_, offsets_1)
grouped_mm_1: "f32[u1, 4]" = torch.ops.ep.grouped_mm(rows_1, l_self_parameters_up_proj_, offsets_1)
value: "f32[u1, 8]" = torch.ops.ep.grouped_mm(inner, l_self_parameters_down_proj_, offsets_1)
value_1: "f32[u0, 8]" = torch.ops.ep.combine.weighted(value, weights_3, send_row_1, send_counts_1, recv_counts_1, recv_map_1, 'expert_major', '', None)
combine = torch.ops.ep.combine(value_1, None, None, send_row, send_counts, recv_counts, recv_map, 'rank_major', '0', None)""",
        )

    def test_aot_forward(self) -> None:
        self.assertExpectedInline(
            self.ranks[0][1],
            """\
plan = torch.ops.ep.plan.default(getitem_1, 4, 'rank_major', 1, 2, '0')
dispatch = torch.ops.ep.dispatch.default(view, mul, None, getitem_2, getitem_3, getitem_4, getitem_5, 'rank_major', '0')
plan_1 = torch.ops.ep.plan.default(getitem_5, 2, 'expert_major', 1, 1, '')
dispatch_1 = torch.ops.ep.dispatch.default(getitem_9, getitem_10, None, getitem_12, getitem_13, getitem_14, getitem_15, 'expert_major', '')
grouped_mm: "f32[u1, 4]" = torch.ops.ep.grouped_mm.default(getitem_19, primals_3, getitem_16)
grouped_mm_1: "f32[u1, 4]" = torch.ops.ep.grouped_mm.default(getitem_19, primals_4, getitem_16)
grouped_mm_2: "f32[u1, 8]" = torch.ops.ep.grouped_mm.default(mul_22, primals_5, getitem_16)
combine: "f32[u0, 8]" = torch.ops.ep.combine.weighted(grouped_mm_2, getitem_20, getitem_12, getitem_13, getitem_14, getitem_15, 'expert_major', '')
combine_1 = torch.ops.ep.combine.default(combine, None, None, getitem_2, getitem_3, getitem_4, getitem_5, 'rank_major', '0')""",
        )

    def test_aot_backward(self) -> None:
        self.assertExpectedInline(
            self.ranks[0][2],
            """\
dispatch_2 = torch.ops.ep.dispatch.default(view_3, None, None, getitem_2, getitem_3, getitem_4, getitem_5, 'rank_major', '0')
dispatch_3 = torch.ops.ep.dispatch.default(getitem_25, None, None, getitem_12, getitem_13, getitem_14, getitem_15, 'expert_major', '')
grouped_mm_3: "f32[u1, 4]" = torch.ops.ep.grouped_mm.default(where, transpose, getitem_16)
grouped_mm_4: "f32[2, 4, 8]" = torch.ops.ep.grouped_mm.transpose(mul_22, where, getitem_16)
grouped_mm_5: "f32[u1, 8]" = torch.ops.ep.grouped_mm.default(mul_31, transpose_1, getitem_16)
grouped_mm_6: "f32[2, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_19, mul_31, getitem_16)
grouped_mm_7: "f32[u1, 8]" = torch.ops.ep.grouped_mm.default(silu_backward, transpose_2, getitem_16)
grouped_mm_8: "f32[2, 8, 4]" = torch.ops.ep.grouped_mm.transpose(getitem_19, silu_backward, getitem_16)
combine_2 = torch.ops.ep.combine.default(add_37, sum_5, None, getitem_12, getitem_13, getitem_14, getitem_15, 'expert_major', '')
combine_3 = torch.ops.ep.combine.default(getitem_31, getitem_32, None, getitem_2, getitem_3, getitem_4, getitem_5, 'rank_major', '0')""",
        )

    def test_ranks_issue_the_same_operators(self) -> None:
        self.assertEqual(*([graph.replace("[6,", "[5,") for graph in graphs] for graphs in self.ranks))


def low_latency_step(x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    rows, plan = torch_ep.low_latency_dispatch(
        x, topk_idx, num_experts=num_experts, max_tokens_per_rank=6, topk_weights=weights
    )
    return torch_ep.low_latency_combine(rows.relu(), plan)


def low_latency_halves(
    x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Another half runs inside of each pair; fp8, statistics."""
    statistics = torch_ep.LowLatencyStatistics.zeros(num_experts)
    sent = torch_ep.low_latency_dispatch_send(
        x, topk_idx, num_experts=num_experts, max_tokens_per_rank=6, topk_weights=weights, quantize="fp8"
    )
    shared = x.relu()
    (rows, scales), plan = torch_ep.low_latency_dispatch_recv(sent, statistics=statistics)
    y = rows.to(x.dtype) * scales
    back = torch_ep.low_latency_combine_send(y, plan, after=shared)
    shared = shared * statistics.tokens_per_expert.sum()
    return torch_ep.low_latency_combine_recv(back) + shared


def low_latency_graphs(step: Callable, num_experts: int, count: int = 5) -> tuple[str, str]:
    """Dynamo's and AOTAutograd's."""
    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    x, weights = torch.randn(count, HIDDEN), torch.rand(count, TOPK)
    topk_idx = torch.tensor([[0, 1]] * count)
    torch.compile(step, fullgraph=True, backend=backend)(x, topk_idx, weights, num_experts)
    torch._dynamo.reset()
    return text(backend.graphs[0]), text(backend.fw_graphs[0])


def _low_latency_graphs_on_ranks(rank: int, world_size: int) -> list[str]:
    steps = (low_latency_step, low_latency_halves)
    return [only_operators(graph) for step in steps for graph in low_latency_graphs(step, EXPERTS, 5 + rank)]


class TestLowLatency(TestCase):
    maxDiff = None

    def test_dynamo(self) -> None:
        self.assertExpectedInline(
            low_latency_graphs(low_latency_step, EXPERTS)[0],
            """\
class GraphModule(torch.nn.Module):
    def forward(self, L_x_: "f32[5, 8]", L_topk_idx_: "i64[5, 2]", L_weights_: "f32[5, 2]"):
        l_x_ = L_x_
        l_topk_idx_ = L_topk_idx_
        l_weights_ = L_weights_

        low_latency_dispatch = torch.ops.ep.low_latency_dispatch(l_x_, l_topk_idx_, l_weights_, '', 4, 6, 1, '', None)
        rows: "f32[4, 6, 8]" = low_latency_dispatch[0]
        recv_row: "i32[6, 2]" = low_latency_dispatch[5]
        row_weights: "f32[4, 6]" = low_latency_dispatch[6]

        value: "f32[4, 6, 8]" = rows.relu()

        low_latency_combine = torch.ops.ep.low_latency_combine(value, l_topk_idx_, row_weights, recv_row, 4, 1, '', None)
        out: "f32[5, 8]" = low_latency_combine[0]
        return (out,)
""",
        )

    def test_aot(self) -> None:
        self.assertExpectedInline(
            low_latency_graphs(low_latency_step, EXPERTS)[1],
            """\
class <lambda>(torch.nn.Module):
    def forward(self, arg0_1: "f32[5, 8]", arg1_1: "i64[5, 2]", arg2_1: "f32[5, 2]"):
        low_latency_dispatch = torch.ops.ep.low_latency_dispatch.default(arg0_1, arg1_1, arg2_1, '', 4, 6, 1, '')
        getitem: "f32[4, 6, 8]" = low_latency_dispatch[0]
        getitem_5: "i32[6, 2]" = low_latency_dispatch[5]
        getitem_6: "f32[4, 6]" = low_latency_dispatch[6]

        relu: "f32[4, 6, 8]" = torch.ops.aten.relu.default(getitem)

        low_latency_combine = torch.ops.ep.low_latency_combine.default(relu, arg1_1, getitem_6, getitem_5, 4, 1, '')
        getitem_8: "f32[5, 8]" = low_latency_combine[0]
        return (getitem_8,)
""",
        )

    def test_dynamo_of_halves(self) -> None:
        self.assertExpectedInline(
            low_latency_graphs(low_latency_halves, EXPERTS)[0],
            """\
class GraphModule(torch.nn.Module):
    def forward(self, L_x_: "f32[5, 8]", L_topk_idx_: "i64[5, 2]", L_weights_: "f32[5, 2]"):
        l_x_ = L_x_
        l_topk_idx_ = L_topk_idx_
        l_weights_ = L_weights_

        counters: "i64[4]" = torch.zeros(4, dtype = torch.int64, device = None)

        counters_1: "i64[1]" = torch.zeros(1, dtype = torch.int64, device = None)

        low_latency_dispatch_send = torch.ops.ep.low_latency_dispatch_send(l_x_, l_topk_idx_, l_weights_, 'fp8', 4, 6, 1, '', None)
        status: "i64[2, 1]" = low_latency_dispatch_send[0]
        data: "u8[6, 64]" = low_latency_dispatch_send[1]

        shared: "f32[5, 8]" = l_x_.relu()

        low_latency_dispatch_recv = torch.ops.ep.low_latency_dispatch_recv(status, data, 8, torch.float32, 2, 'fp8', 4, 6, 1, '', None)
        rows: "f8e4m3fn[4, 6, 8]" = low_latency_dispatch_recv[0]
        scales: "f32[4, 6, 1]" = low_latency_dispatch_recv[1]
        tokens_per_expert: "i32[4]" = low_latency_dispatch_recv[2]
        recv_row: "i32[6, 2]" = low_latency_dispatch_recv[5]
        row_weights: "f32[4, 6]" = low_latency_dispatch_recv[6]
        wait_ns: "i64[1]" = low_latency_dispatch_recv[7]

        add_: "i64[4]" = counters.add_(tokens_per_expert)

        add__1: "i64[1]" = counters_1.add_(wait_ns)

        to: "f32[4, 6, 8]" = rows.to(torch.float32)
        y: "f32[4, 6, 8]" = to * scales

        low_latency_combine_send = torch.ops.ep.low_latency_combine_send(y, l_topk_idx_, row_weights, recv_row, 4, 1, '', shared)
        status_1: "i64[2, 1]" = low_latency_combine_send[0]
        data_1: "u8[6, 32]" = low_latency_combine_send[1]

        sum_1: "i64[]" = counters.sum()
        shared_1: "f32[5, 8]" = shared * sum_1

        low_latency_combine_recv = torch.ops.ep.low_latency_combine_recv(status_1, data_1, l_topk_idx_, 8, torch.float32, 4, 1, '', None)
        out: "f32[5, 8]" = low_latency_combine_recv[0]

        add: "f32[5, 8]" = out + shared_1
        return (add,)
""",
        )

    def test_aot_of_halves(self) -> None:
        self.assertExpectedInline(
            low_latency_graphs(low_latency_halves, EXPERTS)[1],
            """\
class <lambda>(torch.nn.Module):
    def forward(self, arg0_1: "f32[5, 8]", arg1_1: "i64[5, 2]", arg2_1: "f32[5, 2]"):
        zeros: "i64[4]" = torch.ops.aten.zeros.default([4], dtype = torch.int64, device = device(type='cpu'), pin_memory = False)

        low_latency_dispatch_send = torch.ops.ep.low_latency_dispatch_send.default(arg0_1, arg1_1, arg2_1, 'fp8', 4, 6, 1, '')
        getitem: "i64[2, 1]" = low_latency_dispatch_send[0]
        getitem_1: "u8[6, 64]" = low_latency_dispatch_send[1]

        relu: "f32[5, 8]" = torch.ops.aten.relu.default(arg0_1)

        low_latency_dispatch_recv = torch.ops.ep.low_latency_dispatch_recv.default(getitem, getitem_1, 8, torch.float32, 2, 'fp8', 4, 6, 1, '')
        getitem_2: "f8e4m3fn[4, 6, 8]" = low_latency_dispatch_recv[0]
        getitem_3: "f32[4, 6, 1]" = low_latency_dispatch_recv[1]
        getitem_4: "i32[4]" = low_latency_dispatch_recv[2]
        getitem_7: "i32[6, 2]" = low_latency_dispatch_recv[5]
        getitem_8: "f32[4, 6]" = low_latency_dispatch_recv[6]

        add: "i64[4]" = torch.ops.aten.add.Tensor(zeros, getitem_4)

        _to_copy: "f32[4, 6, 8]" = torch.ops.aten._to_copy.default(getitem_2, dtype = torch.float32)
        mul: "f32[4, 6, 8]" = torch.ops.aten.mul.Tensor(_to_copy, getitem_3)

        low_latency_combine_send = torch.ops.ep.low_latency_combine_send.default(mul, arg1_1, getitem_8, getitem_7, 4, 1, '', relu)
        getitem_10: "i64[2, 1]" = low_latency_combine_send[0]
        getitem_11: "u8[6, 32]" = low_latency_combine_send[1]

        sum_1: "i64[]" = torch.ops.aten.sum.default(add)
        mul_1: "f32[5, 8]" = torch.ops.aten.mul.Tensor(relu, sum_1)

        low_latency_combine_recv = torch.ops.ep.low_latency_combine_recv.default(getitem_10, getitem_11, arg1_1, 8, torch.float32, 4, 1, '')
        getitem_12: "f32[5, 8]" = low_latency_combine_recv[0]

        add_2: "f32[5, 8]" = torch.ops.aten.add.Tensor(getitem_12, mul_1)
        return (add_2,)
""",
        )


class TestLowLatencyTwoRanks(TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.ranks = world(2).run(_low_latency_graphs_on_ranks)

    def test_dynamo(self) -> None:
        self.assertExpectedInline(
            self.ranks[0][0],
            """\
low_latency_dispatch = torch.ops.ep.low_latency_dispatch(l_x_, l_topk_idx_, l_weights_, '', 4, 6, 2, '0', None)
low_latency_combine = torch.ops.ep.low_latency_combine(value, l_topk_idx_, row_weights, recv_row, 4, 2, '0', None)""",
        )

    def test_aot(self) -> None:
        self.assertExpectedInline(
            self.ranks[0][1],
            """\
low_latency_dispatch = torch.ops.ep.low_latency_dispatch.default(arg0_1, arg1_1, arg2_1, '', 4, 6, 2, '0')
low_latency_combine = torch.ops.ep.low_latency_combine.default(relu, arg1_1, getitem_6, getitem_5, 4, 2, '0')""",
        )

    def test_dynamo_of_halves(self) -> None:
        self.assertExpectedInline(
            self.ranks[0][2],
            """\
low_latency_dispatch_send = torch.ops.ep.low_latency_dispatch_send(l_x_, l_topk_idx_, l_weights_, 'fp8', 4, 6, 2, '0', None)
low_latency_dispatch_recv = torch.ops.ep.low_latency_dispatch_recv(status, data, 8, torch.float32, 2, 'fp8', 4, 6, 2, '0', None)
low_latency_combine_send = torch.ops.ep.low_latency_combine_send(y, l_topk_idx_, row_weights, recv_row, 4, 2, '0', shared)
low_latency_combine_recv = torch.ops.ep.low_latency_combine_recv(status_1, data_1, l_topk_idx_, 8, torch.float32, 4, 2, '0', None)""",
        )

    def test_aot_of_halves(self) -> None:
        self.assertExpectedInline(
            self.ranks[0][3],
            """\
low_latency_dispatch_send = torch.ops.ep.low_latency_dispatch_send.default(arg0_1, arg1_1, arg2_1, 'fp8', 4, 6, 2, '0')
low_latency_dispatch_recv = torch.ops.ep.low_latency_dispatch_recv.default(getitem, getitem_1, 8, torch.float32, 2, 'fp8', 4, 6, 2, '0')
low_latency_combine_send = torch.ops.ep.low_latency_combine_send.default(mul, arg1_1, getitem_8, getitem_7, 4, 2, '0', relu)
low_latency_combine_recv = torch.ops.ep.low_latency_combine_recv.default(getitem_10, getitem_11, arg1_1, 8, torch.float32, 4, 2, '0')""",
        )

    def test_ranks_issue_the_same_operators(self) -> None:
        self.assertEqual(*([graph.replace("[6,", "[5,") for graph in graphs] for graphs in self.ranks))


def _graphs_differ(rank: int, world_size: int, layout: str) -> list[str]:
    """Where the graphs of a layer on CUDA say something else than those on CPU, but for the device."""
    on_cpu, on_cuda = (graphs_of(layout, device=device) for device in ("cpu", "cuda"))
    return [
        f"{which}: expected {a.strip()}, got {b.strip()}"
        for which, cpu, cuda in zip(("dynamo", "forward", "backward"), on_cpu, on_cuda, strict=True)
        for a, b in itertools.zip_longest(cpu.splitlines(), cuda.splitlines(), fillvalue="nothing")
        if a != re.sub(r"device\(type='cuda', index=\d+\)", "device(type='cpu')", b)
    ]


@pytest.mark.gpu
@needs_cuda
def test_graphs_on_cuda_are_those_on_cpu() -> None:
    with one_rank_on("cuda"):
        assert not _graphs_differ(0, 1, "expert_major")


@pytest.mark.gpu
@needs_cuda
def test_graphs_on_cuda_are_those_on_cpu_on_two_ranks() -> None:
    for differences in Ranks("cuda", 2).run(_graphs_differ, "rank_major"):
        assert not differences
