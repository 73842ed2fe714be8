// dispatch and combine on a grid of nodes, on the CPU, where both levels are composed of permute kernels and an
// exchange.
//
// Note [Columns by turns]
// The columns of the rows are cut into parts. The plans hold for each part alike, so the two exchanges send a message
// per part and peer, and the second level works on one part while the first level receives the next. Sums do not depend
// on the cut: each column is summed on its own. All ranks cut alike, since they agree on the width and dtype of a row.
#include "local/transfer.h"

#include <numeric>

namespace ep {
namespace {

// Bytes of a row in one part, at least: short copies are slow.
constexpr int64_t kMinPartBytes = 512;
// Measured on 2 x 2 CPU ranks, 1024 tokens of 4 KiB (benchmarks/multi_node.py), ms with 1, 2 and 4 parts: 266, 246 and
// 231 with 1 Gbit/s between the nodes; 153, 139 and 167 without a limit.
constexpr int64_t kMaxParts = 4;

// Columns [begin, end) of each part.
std::vector<std::pair<int64_t, int64_t>> cut_columns(const at::Tensor& rows) {
  const int64_t hidden = rows.size(1), row_bytes = hidden * static_cast<int64_t>(rows.element_size());
  const int64_t parts = std::clamp<int64_t>(row_bytes / kMinPartBytes, 1, kMaxParts);
  std::vector<std::pair<int64_t, int64_t>> cut;
  for (int64_t part = 0; part < parts; ++part) {
    cut.emplace_back(hidden * part / parts, hidden * (part + 1) / parts);
  }
  return cut;
}

using Cut = std::vector<std::pair<int64_t, int64_t>>;

at::Tensor columns(const at::Tensor& rows, const std::pair<int64_t, int64_t>& part) {
  return rows.narrow(1, part.first, part.second - part.first);
}

// One contiguous tensor [rows, width] per part, in one buffer.
std::vector<at::Tensor> make_parts(const Cut& cut, int64_t rows, const at::Tensor& like, const Allocate& allocate) {
  const auto buffer = allocate({rows, cut.back().second}, like.options()).view({-1});
  std::vector<at::Tensor> parts;
  for (const auto& [begin, end] : cut) {
    parts.push_back(buffer.narrow(0, rows * begin, rows * (end - begin)).view({rows, end - begin}));
  }
  return parts;
}

// Rows of one rank among those of all.
struct Segment {
  int64_t begin, count;
};

Segment segment_of(const std::vector<int64_t>& rows, int64_t rank) {
  return {std::accumulate(rows.begin(), rows.begin() + rank, int64_t{0}), rows[rank]};
}

// Wire rows of one part, of which those that stay on this rank are written to `received` at once.
template <class Transfer>
RowsOut own_rows_in_place(const Transfer& transfer, const at::Tensor& wire, const at::Tensor& received) {
  const auto own_out = segment_of(transfer.out_rows, transfer.rank());
  const auto own_in = segment_of(transfer.in_rows, transfer.rank());
  return {wire, received.narrow(0, own_in.begin, own_in.count), own_out.begin};
}

// Numbers beside the rows, in one part.
struct Arriving {
  at::Tensor rows;
  size_t transfer;

  // The first `count` rows, zero where fewer have arrived.
  template <class Transfer>
  at::Tensor rows_after_wait(Transfer& on, int64_t count) const {
    on.wait(transfer);
    return fit_rows(rows, count).contiguous();
  }
};

template <class Transfer>
Arriving exchange_all(Transfer& transfer, const at::Tensor& wire) {
  const auto received = with_rows(wire, sum(transfer.in_rows));
  return {received, transfer.start_rows(received, wire)};
}

// Ends an exchange whose peers wait for this rank's rows, after an error at the other level.
template <class Transfer>
void finish_anyway(Transfer& transfer) {
  try {
    transfer.finish();
  } catch (const std::exception&) {
    // The error that is being thrown says more.
  }
}

// Whether both levels are of several ranks, on the CPU.
bool takes_turns(const Backend* in_node, const GridLevel& rail, const GridLevel& node, const at::Tensor& rows) {
  return in_node != nullptr && rail.plan.world_size() > 1 && node.plan.world_size() > 1 && rows.is_cpu() &&
         !force_aten && rows.size(1) > 0;
}

}  // namespace

Payloads ComposedBackend::dispatch_on_grid(
    const GridLevel& rail,
    const GridLevel& node,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  auto* in_node = dynamic_cast<ComposedBackend*>(&node.backend);
  if (!takes_turns(in_node, rail, node, x)) {
    return Backend::dispatch_on_grid(rail, node, x, topk_weights, scales);
  }
  constexpr auto op = OpKind::dispatch;
  const auto& kernels = permute_kernels(x);
  const auto cut = cut_columns(x);
  const auto agreed = agreed_of(x, topk_weights, scales, static_cast<int64_t>(cut.size()) + 1);
  const int64_t relay_rows = node.plan.send_row.size(0), rows = node.plan.recv_map.size(0);

  // The rail: rows arrive in `relayed`, one transfer per part. A plan with a capacity relays another number of rows.
  std::optional<Transfer> on_rail;
  std::vector<at::Tensor> relayed;
  std::vector<size_t> arriving;
  std::optional<Arriving> relayed_weights, relayed_scales;
  linked(op, rail.group_name, [&] {
    on_rail.emplace(*this, op, rail.plan, x, agreed);
    on_rail->run([&] {
      const int64_t sent = sum(on_rail->out_rows), received = sum(on_rail->in_rows);
      const auto& send_row = rail.plan.send_row;
      on_rail->confirm();
      if (topk_weights) {
        relayed_weights = exchange_all(*on_rail, kernels.pack_slots(*topk_weights, send_row, sent));
      }
      if (scales) {
        relayed_scales = exchange_all(*on_rail, kernels.pack_rows(*scales, send_row, sent, allocate_new));
      }
      const auto wire = make_parts(cut, sent, x, allocator(WireBuffer::send));
      relayed = make_parts(cut, std::max(received, relay_rows), x, allocator(WireBuffer::recv));
      for (size_t part = 0; part < cut.size(); ++part) {
        const auto rows_in = relayed[part].narrow(0, 0, received);
        pack_columns(own_rows_in_place(*on_rail, wire[part], rows_in), columns(x, cut[part]), send_row);
        arriving.push_back(on_rail->start_rows(rows_in, wire[part], true));
        relayed[part].narrow(0, received, relayed[part].size(0) - received).zero_();
      }
    });
  });

  return linked(op, node.group_name, [&] {
    try {
      Transfer inside(*in_node, op, node.plan, x, agreed);
      return inside.run([&]() -> Payloads {
        const int64_t sent = sum(inside.out_rows), received = sum(inside.in_rows);
        const auto& send_row = node.plan.send_row;
        inside.confirm();
        std::optional<Arriving> arriving_weights, arriving_scales;
        if (relayed_weights) {
          const auto weights = relayed_weights->rows_after_wait(*on_rail, relay_rows);
          arriving_weights = exchange_all(inside, kernels.pack_slots(weights, send_row, sent));
        }
        if (relayed_scales) {
          const auto of_rows = relayed_scales->rows_after_wait(*on_rail, relay_rows);
          arriving_scales = exchange_all(inside, kernels.pack_rows(of_rows, send_row, sent, allocate_new));
        }
        const auto wire = make_parts(cut, sent, x, in_node->allocator(WireBuffer::send));
        const auto arrived = make_parts(cut, received, x, in_node->allocator(WireBuffer::recv));
        const auto result = at::empty({rows, x.size(1)}, x.options());
        std::vector<size_t> transfers;
        const auto place = [&](size_t part) {
          inside.wait(transfers[part]);
          const auto to = columns(result, cut[part]);
          if (node.plan.expert_major) {
            expand_columns({to}, arrived[part], node.plan.recv_map, node.plan.num_topk());
            return;
          }
          const int64_t kept = std::min(rows, received);
          to.narrow(0, 0, kept).copy_(arrived[part].narrow(0, 0, kept));
          to.narrow(0, kept, rows - kept).zero_();
        };
        for (size_t part = 0; part < cut.size(); ++part) {
          on_rail->wait(arriving[part]);
          const auto from = relayed[part].narrow(0, 0, relay_rows);
          pack_columns(own_rows_in_place(inside, wire[part], arrived[part]), from, send_row);
          transfers.push_back(inside.start_rows(arrived[part], wire[part], true));
          if (part > 0) {
            place(part - 1);
          }
        }
        on_rail->finish();
        place(cut.size() - 1);
        Payloads payloads{result, std::nullopt, std::nullopt};
        if (arriving_weights) {
          const auto weights = arriving_weights->rows_after_wait(inside, received);
          std::get<1>(payloads) = node.plan.expert_major ? kernels.expand_slots(weights, node.plan.recv_map)
                                                         : fit_rows(weights, rows).contiguous();
        }
        if (arriving_scales) {
          const auto of_rows = arriving_scales->rows_after_wait(inside, received);
          std::get<2>(payloads) = node.plan.expert_major
                                      ? kernels.expand_rows(of_rows, node.plan.recv_map, node.plan.num_topk())
                                      : fit_rows(of_rows, rows).contiguous();
        }
        inside.finish();
        return payloads;
      });
    } catch (const std::exception&) {
      finish_anyway(*on_rail);
      throw;
    }
  });
}

Payloads ComposedBackend::combine_on_grid(
    const GridLevel& rail,
    const GridLevel& node,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  auto* in_node = dynamic_cast<ComposedBackend*>(&node.backend);
  if (!takes_turns(in_node, rail, node, y)) {
    return Backend::combine_on_grid(rail, node, y, row_weights, topk_weights, scales);
  }
  constexpr auto op = OpKind::combine;
  const auto& kernels = permute_kernels(y);
  const auto cut = cut_columns(y);
  const auto agreed = agreed_of(y, topk_weights, scales, static_cast<int64_t>(cut.size()) + 1);
  const int64_t relay_rows = node.plan.send_row.size(0), rows = node.plan.recv_map.size(0);

  // The node: this rank's rows are reduced to one per (relay row, rank) and arrive in `returned`.
  std::optional<Transfer> inside;
  std::vector<at::Tensor> returned;
  std::vector<size_t> arriving;
  std::optional<Arriving> returned_weights, returned_scales;
  linked(op, node.group_name, [&] {
    inside.emplace(*in_node, op, node.plan, y, agreed);
    inside->run([&] {
      const int64_t sent = sum(inside->out_rows), received = sum(inside->in_rows);
      const auto& recv_map = node.plan.recv_map;
      const bool expert_major = node.plan.expert_major;
      const int64_t num_topk = node.plan.num_topk();
      inside->confirm();
      if (topk_weights) {
        const auto wire = expert_major ? kernels.return_slots(*topk_weights, recv_map, sent, num_topk)
                                       : fit_rows(*topk_weights, sent);
        returned_weights = exchange_all(*inside, wire.contiguous());
      }
      if (scales) {
        const auto wire = wire_of(kernels, node.plan, *scales, std::nullopt, sent, allocate_new);
        returned_scales = exchange_all(*inside, wire.contiguous());
      }
      const auto wire = make_parts(cut, sent, y, in_node->allocator(WireBuffer::send));
      returned = make_parts(cut, received, y, in_node->allocator(WireBuffer::recv));
      // rank_major: every row is a wire row. A reduction over a single slot applies the weight.
      const int64_t kept = std::min(rows, sent);
      const auto pairs = expert_major ? recv_map : at::arange(kept, node.plan.send_row.options());
      for (size_t part = 0; part < cut.size(); ++part) {
        const auto from = columns(y, cut[part]);
        const bool reduces = expert_major || row_weights;
        if (reduces) {
          const auto out = own_rows_in_place(*inside, wire[part], returned[part]);
          reduce_columns(out, from, row_weights, pairs, expert_major ? num_topk : 1);
        } else {
          wire[part].narrow(0, 0, kept).copy_(from.narrow(0, 0, kept));
          wire[part].narrow(0, kept, sent - kept).zero_();
        }
        arriving.push_back(inside->start_rows(returned[part], wire[part], reduces));
      }
    });
  });

  return linked(op, rail.group_name, [&] {
    try {
      Transfer on_rail(*this, op, rail.plan, y, agreed);
      return on_rail.run([&]() -> Payloads {
        const int64_t sent = sum(on_rail.out_rows), received = sum(on_rail.in_rows);
        const auto& send_row = node.plan.send_row;
        on_rail.confirm();
        std::optional<Arriving> home_weights, home_scales;
        if (returned_weights) {
          const auto weights = returned_weights->rows_after_wait(*inside, sum(inside->in_rows));
          home_weights = exchange_all(on_rail, fit_rows(kernels.gather_slots(weights, send_row), sent).contiguous());
        }
        if (returned_scales) {
          const auto of_rows = returned_scales->rows_after_wait(*inside, sum(inside->in_rows));
          home_scales = exchange_all(on_rail, fit_rows(kernels.sum_rows(of_rows, send_row), sent).contiguous());
        }
        const auto wire = make_parts(cut, std::max(sent, relay_rows), y, allocator(WireBuffer::send));
        const auto home = make_parts(cut, received, y, allocator(WireBuffer::recv));
        std::vector<size_t> transfers;
        for (size_t part = 0; part < cut.size(); ++part) {
          inside->wait(arriving[part]);
          // Rows that this rank did not relay, because of a capacity, have sums of zero.
          const bool is_whole = relay_rows >= sent;
          const RowsOut out = is_whole ? own_rows_in_place(on_rail, wire[part], home[part]) : RowsOut{wire[part]};
          sum_columns(out, returned[part], send_row);
          if (!is_whole) {
            wire[part].narrow(0, relay_rows, sent - relay_rows).zero_();
          }
          transfers.push_back(on_rail.start_rows(home[part], wire[part].narrow(0, 0, sent), is_whole));
        }
        inside->finish();
        const auto result = at::empty({rail.plan.send_row.size(0), y.size(1)}, y.options());
        for (size_t part = 0; part < cut.size(); ++part) {
          on_rail.wait(transfers[part]);
          sum_columns({columns(result, cut[part])}, home[part], rail.plan.send_row);
        }
        Payloads payloads{result, std::nullopt, std::nullopt};
        if (home_weights) {
          std::get<1>(payloads) =
              kernels.gather_slots(home_weights->rows_after_wait(on_rail, received), rail.plan.send_row);
        }
        if (home_scales) {
          std::get<2>(payloads) = kernels.sum_rows(home_scales->rows_after_wait(on_rail, received), rail.plan.send_row);
        }
        on_rail.finish();
        return payloads;
      });
    } catch (const std::exception&) {
      finish_anyway(*inside);
      throw;
    }
  });
}

}  // namespace ep
