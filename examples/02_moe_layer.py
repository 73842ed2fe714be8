"""A compiled MoE layer, trained for a few steps on as many ranks as torchrun starts.

    python examples/02_moe_layer.py
    torchrun --nproc-per-node 2 examples/02_moe_layer.py

Experts are spread over the ranks; the router is replicated, so its gradient is averaged over them.
"""

import argparse

import torch
import torch.distributed as dist

import torch_ep as ep

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
args = parser.parse_args()

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    ep.init()
rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

torch.manual_seed(0)  # the same router and experts whatever the number of ranks
layer = ep.nn.MoE(hidden=32, intermediate=64, num_experts=8, num_topk=2)
step = torch.compile(layer, fullgraph=True, backend=args.backend)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
experts = set(ep.nn.expert_parameter_names(layer))

torch.manual_seed(1 + rank)
x = torch.randn(64, 32)
for n in range(args.steps):
    y, stats = step(x)
    loss = (y - x.roll(1, dims=1)).square().mean() + 0.01 * stats.aux_loss
    optimizer.zero_grad()
    loss.backward()
    for name, parameter in layer.named_parameters():
        if name not in experts and world_size > 1:
            dist.all_reduce(parameter.grad)  # experts have the sum over all ranks' tokens already
        parameter.grad /= world_size
    ep.nn.clip_grad_norm_(layer, 1.0)
    optimizer.step()
    if rank == 0 and n % 5 == 0:
        print(f"step {n}: loss {loss.item():.4f}, rows per expert {stats.tokens_per_expert.tolist()}")
if dist.is_initialized():
    dist.destroy_process_group()
