"""Decoding: the low-latency pair, without a plan, with static shapes and counts on the device.

python examples/03_decode.py
torchrun --nproc-per-node 2 examples/03_decode.py
"""

import torch
import torch.distributed as dist

import torch_ep as ep

TOKENS, MAX_TOKENS, HIDDEN, EXPERTS, TOPK = 4, 8, 128, 8, 2

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    ep.init()
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

torch.manual_seed(rank)
x = torch.randn(TOKENS, HIDDEN)
topk_weights, topk_idx = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(TOPK)
experts = torch.randn(EXPERTS // world_size, HIDDEN, HIDDEN) / HIDDEN**0.5

with torch.no_grad():
    # rows: [local experts, world_size * MAX_TOKENS, HIDDEN]; the first tokens_per_expert[e] rows of expert e are there.
    (rows, scales), plan = ep.low_latency_dispatch(
        x, topk_idx, num_experts=EXPERTS, max_tokens_per_rank=MAX_TOKENS, topk_weights=topk_weights, quantize="fp8"
    )
    # A masked grouped GEMM would read rows and scales as they are; here every row is multiplied, padding included.
    wide = rows.float() * scales.repeat_interleave(128, dim=2)
    y = torch.bmm(wide.nan_to_num(), experts)
    out = ep.low_latency_combine(y.to(x.dtype), plan)

print(f"rank {rank}: rows per local expert {plan.tokens_per_expert.tolist()}, output {list(out.shape)}")
if dist.is_initialized():
    dist.destroy_process_group()
