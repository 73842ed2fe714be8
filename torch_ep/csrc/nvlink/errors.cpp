#include "nvlink/errors.h"

#include "core/cuda_stream.h"
#include "core/types.h"

#include <c10/core/ScalarType.h>

#include <sstream>
#include <vector>

namespace ep::nvlink {
namespace {

std::string describe_topk(const FailureReport& report) {
  if (report.kind == Failure::too_many_tokens) {
    return "ep::plan: expected at most max_tokens_per_rank tokens, got more";
  }
  std::ostringstream message;
  if (report.kind == Failure::bad_expert) {
    message << name_of(report.op) << ": expected topk_idx in [-1, " << report.ours << "), got " << report.theirs
            << " at token " << report.token << ", slot " << report.slot;
  } else {
    message << name_of(report.op) << ": expected different experts in one token, got expert " << report.theirs
            << " at token " << report.token << ", slots " << report.earlier_slot << " and " << report.slot;
  }
  return message.str();
}

std::string describe_plan(const FailureReport& report) {
  std::ostringstream message;
  message << name_of(report.op) << ": expected " << (report.kind == Failure::bad_send_row ? "send_row" : "recv_pair")
          << " of this plan in [-1, " << report.ours << "), in the order of ep::plan, got " << report.theirs
          << " (exchange " << report.epoch << ")";
  return message.str();
}

// The name of a field in error messages.
const char* field_name(HandshakeField field) {
  switch (field) {
    case HandshakeField::num_experts:
      return "num_experts";
    case HandshakeField::num_topk:
      return "num_topk";
    case HandshakeField::hidden:
      return "hidden";
    case HandshakeField::dtype:
      return "dtype";
    case HandshakeField::max_tokens:
      return "max_tokens_per_rank";
    case HandshakeField::quantize:
      return "quantize (0: none, 1: fp8, 2: fp8_pow2, 3: fp8_ue8m0)";
    case HandshakeField::weight_bytes:
      return "bytes of topk_weights per token";
    case HandshakeField::weight_dtype:
      return "dtype of topk_weights";
    case HandshakeField::scale_bytes:
      return "bytes of scales per token";
    case HandshakeField::scale_dtype:
      return "dtype of scales";
    case HandshakeField::op:
    case HandshakeField::rows_to_peer:
    case HandshakeField::rows_from_peer:
      break;
  }
  return "arguments";
}

bool is_dtype(HandshakeField field) {
  return field == HandshakeField::dtype || field == HandshakeField::weight_dtype ||
         field == HandshakeField::scale_dtype;
}

std::string describe_mismatch(const std::string& group_name, const Comm& comm, const FailureReport& report) {
  std::ostringstream message;
  message << name_of(report.op) << ": ";
  switch (report.field) {
    case HandshakeField::op:
      message << "ranks issued different sequences of operators on group '" << group_name << "': rank " << comm.rank
              << " is in " << name_of(report.op) << " (exchange " << report.epoch << "), rank " << report.peer << " in "
              << name_of(static_cast<OpKind>(report.theirs)) << " (exchange " << report.their_epoch << ")";
      break;
    case HandshakeField::rows_to_peer:
    case HandshakeField::rows_from_peer: {
      const bool outward = report.field == HandshakeField::rows_to_peer;
      const int from = outward ? comm.rank : report.peer, to = outward ? report.peer : comm.rank;
      message << "expected the same plan on every rank, got one by which " << (outward ? report.theirs : report.ours)
              << " rows go from rank " << from << " to rank " << to << ", where rank " << from << " sends "
              << (outward ? report.ours : report.theirs);
      break;
    }
    default: {
      const auto show = [&](int64_t value) {
        return is_dtype(report.field) ? std::string(c10::toString(static_cast<at::ScalarType>(value)))
                                      : std::to_string(value);
      };
      message << "expected the same " << field_name(report.field) << " on every rank, got " << show(report.ours)
              << " on rank " << comm.rank << " and " << show(report.theirs) << " on rank " << report.peer;
    }
  }
  return message.str();
}

// The last exchange that rank `source` has entered, among those that use the same words as exchange `epoch`.
uint64_t last_entered(const Comm& comm, OpKind op, uint64_t epoch, int source, const Stream& stream) {
  const auto half = static_cast<int>(epoch % 2);
  const auto read = [&](int64_t offset) {
    uint64_t value = 0;
    stream.copy(&value, comm.buffers[comm.rank] + offset, sizeof(value));
    return value;
  };
  // Words and packets of the low-latency pair hold the lower half of the number in their own upper half.
  const auto number = [&](int64_t offset) { return (epoch & ~uint64_t{0xffffffff}) | read(offset) >> 32; };
  switch (op) {
    case OpKind::low_latency_dispatch:
      return number(comm.low_latency.announcement(half, source));
    case OpKind::low_latency_combine:
      return number(comm.low_latency.entered(half, source) + kPacketBytes - static_cast<int64_t>(sizeof(uint64_t)));
    default:
      return read(comm.layout.header(half, source) + Header::kEpoch * static_cast<int64_t>(sizeof(uint64_t)));
  }
}

// Ranks that have not entered the exchange, as far as this rank knows.
std::vector<int> absent(const Comm& comm, const FailureReport& report) {
  const auto epoch = static_cast<uint64_t>(report.epoch);
  std::vector<int> ranks;
  const Stream stream;
  for (int r = 0; r < comm.layout.world_size; ++r) {
    if (r != comm.rank && last_entered(comm, report.op, epoch, r, stream) < epoch) {
      ranks.push_back(r);
    }
  }
  return ranks;
}

std::string describe_order(const std::string& group_name, const FailureReport& report) {
  std::ostringstream message;
  message << name_of(report.op) << ": expected exchange " << report.ours << " of group '" << group_name
          << "' to be received next, got the status of exchange " << report.theirs
          << ": exchanges are received in the order in which they were sent, each once. torch_ep.reset(group) on "
             "every rank makes the group usable again";
  return message.str();
}

std::string describe_third_send(const std::string& group_name, const FailureReport& report) {
  std::ostringstream message;
  message << name_of(report.op) << ": expected at most two exchanges of group '" << group_name
          << "' on their way, got a third, exchange " << report.epoch
          << ", before the first was received. torch_ep.reset(group) on every rank makes the group usable again";
  return message.str();
}

std::string describe_absence(const std::string& group_name, const Comm& comm, const FailureReport& report) {
  static constexpr const char* kPhases[] = {"headers", "the buffer", "counts", "rows", "its own blocks"};
  std::ostringstream message;
  message << name_of(report.op) << ": rank " << comm.rank << " waited in exchange " << report.epoch << " of group '"
          << group_name << "' (" << kPhases[static_cast<int>(report.phase)] << ", timeout "
          << comm.timeout_ns / 1'000'000 << " ms) for ";
  // A rank that waits for a credit has entered no exchange that peers could have seen.
  auto late = report.phase == Phase::credit ? std::vector<int>() : absent(comm, report);
  const int missing = report.kind == Failure::peer_aborted ? report.missing_rank : report.peer;
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

std::string describe(const std::string& group_name, const Comm& comm, const FailureReport& report) {
  std::ostringstream message;
  switch (report.kind) {
    case Failure::timeout:
    case Failure::peer_aborted:
      return describe_absence(group_name, comm, report);
    case Failure::too_many_in_flight:
      return describe_third_send(group_name, report);
    case Failure::out_of_order:
      return describe_order(group_name, report);
    case Failure::mismatch:
      return describe_mismatch(group_name, comm, report);
    case Failure::mismatch_of_peer:
      message << name_of(report.op) << ": rank " << report.peer << " disagrees with another rank in exchange "
              << report.epoch << " of group '" << group_name << "', whose errors say on what";
      return message.str();
    case Failure::too_many_tokens:
    case Failure::bad_expert:
    case Failure::duplicate_expert:
      if (report.peer != comm.rank) {
        message << name_of(report.op) << ": rank " << report.peer << " failed before exchange " << report.epoch << ": ";
      }
      return message.str() + describe_topk(report);
    case Failure::bad_send_row:
    case Failure::bad_recv_pair:
      return describe_plan(report);
    default:
      return "torch_ep: a kernel reported no failure that is known";
  }
}

}  // namespace ep::nvlink
