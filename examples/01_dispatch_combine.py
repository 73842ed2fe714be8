"""Dispatch and combine as operators: one linear layer per expert, with gradients.

python examples/01_dispatch_combine.py
torchrun --nproc-per-node 2 examples/01_dispatch_combine.py
"""

import torch
import torch.distributed as dist

import torch_ep as ep

TOKENS, HIDDEN, EXPERTS, TOPK = 16, 32, 8, 2

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    ep.init()
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

torch.manual_seed(rank)
x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
scores = torch.randn(TOKENS, EXPERTS).softmax(-1)
topk_weights, topk_idx = scores.topk(TOPK)
experts = torch.randn(EXPERTS // world_size, HIDDEN, HIDDEN, requires_grad=True)  # those of this rank

plan = ep.plan(topk_idx, EXPERTS)
rows, row_weights = ep.dispatch(x, plan, topk_weights=topk_weights)
# rows are grouped by local expert; plan.offsets says where each group ends.
y = ep.nn.grouped_mm(rows, experts, plan.offsets)
out = ep.combine(y, plan, row_weights=row_weights)
out.square().mean().backward()

print(
    f"rank {rank}: {TOKENS} tokens left for {plan.send_counts.tolist()} rows per rank, "
    f"{plan.tokens_per_expert.tolist()} rows per local expert came, "
    f"gradient norms {x.grad.norm():.4f} (tokens) and {experts.grad.norm():.4f} (experts)"
)
if dist.is_initialized():
    dist.destroy_process_group()
