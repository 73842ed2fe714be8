#include "nvlink/errors.h"

#include "c10d/communicator.h"
#include "core/cuda_stream.h"

#include <c10/core/ScalarType.h>

#include <sstream>
#include <vector>

namespace ep::nvlink {
namespace {

const char* op_name(int64_t op) {
  return name_of(static_cast<OpKind>(op));
}

std::string describe_topk(const HostReport& report) {
  if (report.ours == kTooManyTokens) {
    return "ep::plan: expected at most max_tokens_per_rank tokens, got more";
  }
  std::ostringstream message;
  const int64_t num_topk = report.theirs_epoch >> 32, num_experts = report.theirs_epoch & 0xffffffff;
  const int64_t token = report.detail / num_topk, slot = report.detail % num_topk;
  if (report.ours == kOutOfRange) {
    message << op_name(report.op) << ": expected topk_idx in [-1, " << num_experts << "), got " << report.theirs
            << " at token " << token << ", slot " << slot;
  } else {
    message << op_name(report.op) << ": expected different experts in one token, got expert " << report.theirs
            << " at token " << token << ", slots " << report.ours << " and " << slot;
  }
  return message.str();
}

std::string describe_plan(const HostReport& report) {
  static constexpr const char* kNames[] = {"send_row", "recv_pair"};
  std::ostringstream message;
  message << op_name(report.op) << ": expected " << kNames[report.detail] << " of this plan in [-1, " << report.ours
          << "), in the order of ep::plan, got " << report.theirs << " (exchange " << report.epoch << ")";
  return message.str();
}

std::string describe_mismatch(const std::string& group_name, const Comm& comm, const HostReport& report) {
  std::ostringstream message;
  const auto op = static_cast<OpKind>(report.op);
  message << name_of(op) << ": ";
  if (report.detail == 0) {
    message << "ranks issued different sequences of operators on group '" << group_name << "': rank " << comm.rank
            << " is in " << name_of(op) << " (exchange " << report.epoch << "), rank " << report.peer << " in "
            << op_name(report.theirs) << " (exchange " << report.theirs_epoch << ")";
  } else if (op == OpKind::low_latency_dispatch || op == OpKind::low_latency_combine) {
    static constexpr const char* kNames[] = {"", "num_topk of num_experts", "hidden", "max_tokens_per_rank", "dtype"};
    const bool of_rows = op == OpKind::low_latency_combine && report.detail == 1;
    const auto show = [&](int64_t value) -> std::string {
      static constexpr const char* kElements[] = {"Double", "Float", "BFloat16", "Half"};
      static constexpr const char* kQuantize[] = {"", " as fp8", " as fp8_pow2", " as fp8_ue8m0"};
      const int64_t high = value >> 32, low = value & 0xffffffff;
      if (of_rows) {
        return std::to_string((value & 0x3fff) * kVector) + " of " + kElements[value >> 14 & 3];
      }
      switch (report.detail) {
        case 1:
          return std::to_string(high) + " of " + std::to_string(low);
        case kNumAgreed:
          return std::string(kElements[high % 4]) + kQuantize[low % 4];
        default:
          return std::to_string(value);
      }
    };
    message << "expected the same " << (of_rows ? "bytes of a row" : kNames[report.detail]) << " on every rank, got "
            << show(report.ours) << " on rank " << comm.rank << " and " << show(report.theirs) << " on rank "
            << report.peer;
  } else if (report.detail <= kNumAgreed) {
    static constexpr const char* kPlanNames[] = {"num_experts", "num_topk", "", ""};
    static constexpr const char* kMoveNames[] = {
        "hidden", "dtype", "bytes of topk_weights a token", "bytes of scales a token"};
    static constexpr const char* kTypeNames[] = {"", "", "dtype of topk_weights", "dtype of scales"};
    const bool of_payload = op != OpKind::plan && report.detail > 2;
    constexpr int64_t bytes = (int64_t{1} << kDtypeShift) - 1;
    const bool of_types = of_payload && (report.ours & bytes) == (report.theirs & bytes);
    const bool is_dtype = of_types || (op != OpKind::plan && report.detail == 2);
    const auto show = [&](int64_t value) {
      value = of_types ? value >> kDtypeShift : of_payload ? value & bytes : value;
      return is_dtype ? std::string(c10::toString(static_cast<at::ScalarType>(value))) : std::to_string(value);
    };
    const auto& names = op == OpKind::plan ? kPlanNames : of_types ? kTypeNames : kMoveNames;
    message << "expected the same " << names[report.detail - 1] << " on every rank, got " << show(report.ours)
            << " on rank " << comm.rank << " and " << show(report.theirs) << " on rank " << report.peer;
  } else {
    const bool outward = report.detail == kNumAgreed + 1;
    const int64_t from = outward ? comm.rank : report.peer, to = outward ? report.peer : comm.rank;
    message << "expected the same plan on every rank, got one by which " << (outward ? report.theirs : report.ours)
            << " rows go from rank " << from << " to rank " << to << ", where rank " << from << " sends "
            << (outward ? report.ours : report.theirs);
  }
  return message.str();
}

// The last exchange that rank `source` has announced to this one, in the half of `epoch`.
uint64_t announced(const Comm& comm, OpKind op, uint64_t epoch, int source, const Stream& stream) {
  const auto half = static_cast<int>(epoch % 2);
  const auto word = [&](int64_t offset) {
    uint64_t value = 0;
    stream.copy(&value, comm.buffers[comm.rank] + offset, sizeof(value));
    return value;
  };
  // Of the low-latency pair, the lower half of the number is the upper half of the word.
  const auto number = [&](int64_t offset) { return (epoch & ~uint64_t{0xffffffff}) | word(offset) >> 32; };
  switch (op) {
    case OpKind::low_latency_dispatch:
      return number(comm.low_latency.announcement(half, source));
    case OpKind::low_latency_combine:
      return number(comm.low_latency.entered(half, source));
    default:
      static_assert(offsetof(Header, epoch) == 0);
      return word(comm.layout.header(half, source));
  }
}

// Ranks of which this one saw no header of the exchange.
std::vector<int> absent(const Comm& comm, const HostReport& report) {
  const auto epoch = static_cast<uint64_t>(report.epoch);
  std::vector<int> ranks;
  const Stream stream;
  for (int r = 0; r < comm.layout.world_size; ++r) {
    if (r != comm.rank && announced(comm, static_cast<OpKind>(report.op), epoch, r, stream) < epoch) {
      ranks.push_back(r);
    }
  }
  return ranks;
}

std::string describe_order(const std::string& group_name, const HostReport& report) {
  std::ostringstream message;
  message << op_name(report.op) << ": expected exchange " << report.ours << " of group '" << group_name
          << "' to be received next, got the ticket of exchange " << report.theirs
          << ": exchanges are received in the order in which they were sent, each once. torch_ep.reset(group) on "
             "every rank makes the group usable again";
  return message.str();
}

bool is_third_send(const Comm& comm, const HostReport& report) {
  return static_cast<Failure>(report.kind) == Failure::timeout && report.peer == comm.rank &&
         static_cast<Phase>(report.phase) == Phase::credit;
}

std::string describe_third_send(const std::string& group_name, const HostReport& report) {
  std::ostringstream message;
  message << op_name(report.op) << ": expected at most two exchanges of group '" << group_name
          << "' on their way, got a third, exchange " << report.epoch
          << ", before the first was received. torch_ep.reset(group) on every rank makes the group usable again";
  return message.str();
}

std::string describe_absence(const std::string& group_name, const Comm& comm, const HostReport& report) {
  const auto kind = static_cast<Failure>(report.kind);
  static constexpr const char* kPhases[] = {"headers", "the buffer", "counts", "rows", "its own blocks"};
  std::ostringstream message;
  message << op_name(report.op) << ": rank " << comm.rank << " waited in exchange " << report.epoch << " of group '"
          << group_name << "' (" << kPhases[report.phase] << ", timeout " << comm.timeout_ns / 1'000'000 << " ms) for ";
  // Who waits for a credit has entered no exchange that peers could have seen.
  auto late = static_cast<Phase>(report.phase) == Phase::credit ? std::vector<int>() : absent(comm, report);
  const auto missing = static_cast<int>(kind == Failure::peer_aborted ? report.detail : report.peer);
  if (late.empty() && missing == comm.rank) {
    message << "rank " << report.peer << ", which gave up this exchange: rank " << comm.rank << " came too late";
  } else {
    if (late.empty()) {
      late.push_back(missing);
    }
    message << (late.size() == 1 ? "rank " : "ranks ");
    for (size_t i = 0; i < late.size(); ++i) {
      message << (i ? ", " : "") << late[i];
    }
    message << ", not heard of since: dead, stalled, or running something else";
  }
  message << ". If every rank is alive, torch_ep.reset(group) on all of them makes the group usable again";
  return message.str();
}

}  // namespace

std::string describe(const std::string& group_name, const Comm& comm, const HostReport& report) {
  std::ostringstream message;
  switch (static_cast<Failure>(report.kind)) {
    case Failure::timeout:
    case Failure::peer_aborted:
      return is_third_send(comm, report) ? describe_third_send(group_name, report)
                                         : describe_absence(group_name, comm, report);
    case Failure::bad_order:
      return describe_order(group_name, report);
    case Failure::mismatch:
      return describe_mismatch(group_name, comm, report);
    case Failure::mismatch_of_peer:
      message << op_name(report.op) << ": rank " << report.peer << " disagrees with another rank in exchange "
              << report.epoch << " of group '" << group_name << "', whose errors say on what";
      return message.str();
    case Failure::bad_topk:
      if (report.peer != comm.rank) {
        message << op_name(report.op) << ": rank " << report.peer << " failed before exchange " << report.epoch << ": ";
      }
      return message.str() + describe_topk(report);
    case Failure::bad_plan:
      return describe_plan(report);
    default:
      return "torch_ep: a kernel reported no failure that is known";
  }
}

}  // namespace ep::nvlink
