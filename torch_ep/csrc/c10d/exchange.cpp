#include "c10d/exchange.h"

#include "core/backend.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <sstream>

namespace ep {
namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::steady_clock;
using std::chrono::system_clock;

// How much longer the second exchange of a call waits: see Note [Linked groups].
constexpr milliseconds kReportTime{2000};

// How often a wait for the device runs signal handlers and polls the peers.
constexpr milliseconds kDeviceTick{100};

// Note [One verdict]
// A header holds only the rows between its sender and its receiver: the counts of all pairs would be W numbers per
// header and W squared per rank. But every rank must detect a disagreement between any two ranks. So a header also
// holds two sums of hashes: one over the rows that its sender sends to each peer, one over the rows that it expects
// from each peer. Added over all headers, the two sums are equal if every rank receives the rows that it expects.
uint64_t mix(uint64_t x) {  // the finalizer of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint64_t digest(int from, int to, int64_t rows) {
  return mix(mix(mix(static_cast<uint64_t>(from) + 1) + static_cast<uint64_t>(to)) + static_cast<uint64_t>(rows));
}

// Rows as bytes: a transfer does not depend on their dtype. An empty tensor may have strides of zero, which `view`
// rejects.
at::Tensor as_bytes(const at::Tensor& rows) {
  return rows.numel() > 0
             ? rows.view(at::kByte)
             : at::empty({rows.size(0), rows.size(1) * rows.element_size()}, rows.options().dtype(at::kByte));
}

}  // namespace

Exchange::Exchange(
    std::shared_ptr<Communicator> comm,
    OpKind op,
    std::vector<int64_t> send_rows,
    const std::vector<int64_t>& recv_rows,
    const std::vector<Agreed>& agreed,
    const std::optional<std::string>& failure)
    : comm_(std::move(comm)),
      group_(c10d::resolve_process_group(comm_->group_name)),
      op_(op),
      entry_(std::in_place, *comm_->channel),
      send_rows_(std::move(send_rows)),
      expected_rows_(recv_rows),
      agreed_(agreed),
      failed_(failure.has_value()),
      deadline_(
          steady_clock::now() + comm_->timeout +
          (is_second_exchange(op, comm_->group_name) ? kReportTime : milliseconds(0))) {
  TORCH_INTERNAL_ASSERT(agreed.size() <= Header::kMaxAgreed);
  ++exchanges_begun();
  check_closed();
  auto& channel = *comm_->channel;
  sequence_ = channel.sequence();
  entered_ns_ = duration_cast<nanoseconds>(system_clock::now().time_since_epoch()).count();
  Header common{};
  common.op = static_cast<int64_t>(op_);
  common.state = failed_ ? Header::kFailed : Header::kHealthy;
  common.entered_ns = entered_ns_;
  for (int peer = 0; peer < comm_->world_size; ++peer) {
    common.send_digest += digest(comm_->rank, peer, send_rows_[peer]);
    common.expected_digest += expected_rows_.empty() ? 0 : digest(peer, comm_->rank, expected_rows_[peer]);
  }
  for (size_t i = 0; i < agreed.size(); ++i) {
    common.agreed[i] = agreed[i].value;
  }
  if (failure) {
    std::strncpy(common.message.data(), failure->c_str(), common.message.size() - 1);
  }
  run([&] {
    channel.send_headers(
        [&](int peer, Header& header) {
          common.sequence = header.sequence;
          common.send_rows = send_rows_[peer];
          common.expected_rows = expected_rows_.empty() ? Header::kUnknown : expected_rows_[peer];
          header = common;
        },
        deadline_);
  });
}

int64_t Exchange::shown(int rank) const {
  return is_linked(comm_->group_name) ? comm_->global_ranks[rank] : rank;
}

std::string Exchange::list_ranks(const std::vector<int>& ranks) const {
  std::ostringstream out;
  out << (ranks.size() == 1 ? "rank " : "ranks ");
  for (size_t i = 0; i < ranks.size(); ++i) {
    out << (i ? ", " : "") << shown(ranks[i]);
  }
  return out.str();
}

std::string Exchange::rank_note() const {
  return is_linked(comm_->group_name) ? "" : comm_->rank_note;
}

Exchange::~Exchange() {
  if (!entry_) {
    comm_->channel->leave();
    return;
  }
  close("an error between the start and the end of exchange " + std::to_string(sequence_));
}

void Exchange::check_closed() const {
  const auto& why = comm_->channel->closed();
  if (!why.empty()) {
    std::ostringstream message;
    message << name_of(op_) << ": group '" << comm_->group_name << "' is closed since an exchange on it failed on rank "
            << shown(comm_->rank) << ": call torch_ep.reset(group) on every rank. The failure was: " << why;
    C10_THROW_ERROR(DistError, message.str());
  }
}

void Exchange::close(const std::string& why, const std::vector<int>& blamed) {
  if (!is_over_) {
    is_over_ = true;
    comm_->channel->close(why, blamed);
  }
}

std::vector<int64_t> Exchange::confirm() {
  std::vector<Header> headers;
  run([&] {
    if (const auto failure = comm_->channel->wait_headers(headers, deadline_)) {
      fail(Phase::headers, *failure);
    }
  });
  if (failed_) {
    is_over_ = true;
    return {};
  }
  const int rank = comm_->rank, world_size = comm_->world_size;
  std::ostringstream message;
  message << name_of(op_) << ": ";
  // All ranks come to the same verdict, so no rank sends rows: the channel stays open.
  const auto disagree = [&] {
    is_over_ = true;
    C10_THROW_ERROR(DistError, message.str() + rank_note());
  };

  for (int peer = 0; peer < world_size; ++peer) {
    if (peer != rank && headers[peer].state == Header::kFailed) {
      const auto& text = headers[peer].message;
      message << "rank " << shown(peer) << " failed before exchange " << sequence_ << ": "
              << std::string(text.data(), strnlen(text.data(), text.size()));
      disagree();
    }
  }
  for (int peer = 0; peer < world_size; ++peer) {
    const auto& h = headers[peer];
    if (peer != rank && (h.op != static_cast<int64_t>(op_) || h.sequence != sequence_)) {
      message << "ranks issued different sequences of operators on group '" << comm_->group_name << "': rank "
              << shown(rank) << " is in " << name_of(op_) << " (exchange " << sequence_ << "), rank " << shown(peer)
              << " in " << name_of(static_cast<OpKind>(h.op)) << " (exchange " << h.sequence
              << "): call the same operators in the same order on every rank";
      disagree();
    }
  }
  uint64_t sent = 0, expected = 0;
  for (int peer = 0; peer < world_size; ++peer) {
    if (peer == rank) {
      continue;
    }
    for (size_t i = 0; i < agreed_.size(); ++i) {
      const int64_t theirs = headers[peer].agreed[i];
      if (theirs != agreed_[i].value) {
        const auto show = [&](int64_t value) {
          return agreed_[i].is_dtype ? std::string(c10::toString(static_cast<at::ScalarType>(value)))
                                     : std::to_string(value);
        };
        message << "expected the same " << agreed_[i].name << " on every rank, got " << show(agreed_[i].value)
                << " on rank " << shown(rank) << " and " << show(theirs) << " on rank " << shown(peer);
        disagree();
      }
    }
    sent += headers[peer].send_digest;
    expected += headers[peer].expected_digest;
  }
  if (!expected_rows_.empty()) {
    for (int peer = 0; peer < world_size; ++peer) {
      sent += digest(rank, peer, send_rows_[peer]);
      expected += digest(peer, rank, expected_rows_[peer]);
    }
  }
  const auto check_pair = [&](int from, int to, int64_t sends, int64_t expects) {
    if (expects != Header::kUnknown && expects != sends) {
      message << "expected the same plan on every rank, got one by which " << expects << " rows go from rank "
              << shown(from) << " to rank " << shown(to) << ", where rank " << shown(from) << " sends " << sends;
      disagree();
    }
  };
  std::vector<int64_t> recv_rows(world_size);
  wait_ns_.resize(world_size);
  for (int peer = 0; peer < world_size; ++peer) {
    const auto& h = headers[peer];
    if (peer == rank) {
      recv_rows[peer] = send_rows_[peer];
      check_pair(rank, rank, send_rows_[rank], expected_rows_.empty() ? Header::kUnknown : expected_rows_[rank]);
      continue;
    }
    check_pair(peer, rank, h.send_rows, expected_rows_.empty() ? Header::kUnknown : expected_rows_[peer]);
    check_pair(rank, peer, send_rows_[peer], h.expected_rows);
    recv_rows[peer] = h.send_rows;
    wait_ns_[peer] = std::max<int64_t>(0, h.entered_ns - entered_ns_);
  }
  if (!expected_rows_.empty() && sent != expected) {
    message << "expected the same plan on every rank, got different ones on other ranks, which say between whom";
    disagree();
  }
  run([&] {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    for (int peer = 0; peer < world_size; ++peer) {
      TORCH_CHECK_VALUE(
          recv_rows[peer] >= 0 && recv_rows[peer] <= most,
          name_of(op_),
          ": expected 0 to 2**31 - 1 rows from each rank, got ",
          recv_rows[peer],
          " from rank ",
          shown(peer));
    }
  });
  return recv_rows;
}

size_t Exchange::start(
    const at::Tensor& output,
    const at::Tensor& input,
    const std::vector<int64_t>& recv_rows,
    bool has_own_rows) {
  auto& transfer = transfers_.emplace_back();
  if (input.size(1) == 0) {
    return transfers_.size() - 1;  // rows of width zero, on every rank: the headers agreed
  }
  run([&] {
    auto out = as_bytes(output), in = as_bytes(input);
    transfer.output = output;
    transfer.input = input;
    if (!out.is_cpu()) {
      auto output_splits = recv_rows;
      auto input_splits = send_rows_;
      c10d::AllToAllOptions options;
      options.timeout = comm_->timeout;
      transfer.device_work = group_->alltoall_base(out, in, output_splits, input_splits, options);
      return;
    }
    auto& channel = *comm_->channel;
    // Receives first: gloo sends nothing before the peer has posted the receive. The copy of own rows overlaps both.
    channel.recv_rows(out, recv_rows, transfer.messages);
    channel.send_rows(in, send_rows_, transfer.messages);
    const int rank = comm_->rank;
    if (recv_rows[rank] > 0 && !has_own_rows) {
      const auto before = [&](const std::vector<int64_t>& counts) {
        return std::accumulate(counts.begin(), counts.begin() + rank, int64_t{0});
      };
      out.narrow(0, before(recv_rows), recv_rows[rank]).copy_(in.narrow(0, before(send_rows_), recv_rows[rank]));
    }
  });
  return transfers_.size() - 1;
}

void Exchange::wait(size_t transfer) {
  auto& pending = transfers_[transfer];
  run([&] {
    if (pending.device_work) {
      await_device(pending.device_work);
    }
    if (const auto failure = comm_->channel->wait(pending.messages, deadline_)) {
      fail(Phase::rows, *failure);
    }
  });
  // Frees the send buffers: later steps, such as expand, can use their memory.
  pending = {};
}

void Exchange::finish() {
  for (size_t i = 0; i < transfers_.size(); ++i) {
    wait(i);
  }
  transfers_.clear();
  is_over_ = true;
}

void Exchange::resume() {
  entry_.emplace(*comm_->channel);
  deadline_ = steady_clock::now() + comm_->timeout;
  if (!comm_->channel->closed().empty()) {
    is_over_ = true;
    check_closed();
  }
}

// The group's own backend moves these rows, and does not receive failure notes: poll for them.
void Exchange::await_device(const c10::intrusive_ptr<c10d::Work>& work) {
  auto next_poll = steady_clock::now() + kDeviceTick;
  while (!work->isCompleted()) {
    const auto now = steady_clock::now();
    if (now > next_poll) {
      next_poll = now + kDeviceTick;
      const auto failure = comm_->channel->check_peers();
      if (failure || now > deadline_) {
        fail(Phase::rows, failure.value_or(Failure{}), "the transfer of the group's own backend did not end");
      }
    }
    std::this_thread::yield();
  }
  try {
    work->wait();  // orders the current stream after the transfer; rethrows the backend's own error
  } catch (const std::exception& error) {
    const auto failure = comm_->channel->check_peers();
    fail(Phase::rows, failure.value_or(Failure{}), message_of(error));
  }
}

void Exchange::fail(Phase phase, const Failure& failure, const std::string& cause) {
  const int rank = comm_->rank;
  const auto has = [](const std::vector<int>& ranks, int one) {
    return std::find(ranks.begin(), ranks.end(), one) != ranks.end();
  };
  // Other ranks closed their connections because of this rank, or it did not run for longer than their timeout.
  const bool is_late = has(failure.blamed, rank) ||
                       (failure.stalled >= comm_->timeout && failure.origins.empty() && !failure.lost.empty());
  auto missing = failure.origins.empty() ? failure.lost : std::vector<int>();
  for (const int other : failure.blamed) {
    if (!has(failure.note_senders, other) && !has(missing, other)) {
      missing.push_back(other);
    }
  }
  if (failure.note_senders.empty() && missing.empty()) {
    missing = failure.silent;
  }
  std::sort(missing.begin(), missing.end());

  std::ostringstream message;
  std::vector<int> blamed;
  message << name_of(op_) << ": rank " << shown(rank);
  const auto where = [&]() -> std::ostringstream& {
    message << "exchange " << sequence_ << " of group '" << comm_->group_name << "' ("
            << (phase == Phase::headers ? "headers" : "rows") << ", timeout " << comm_->timeout.count() << " ms)";
    return message;
  };
  if (is_late) {
    blamed = {rank};
    message << " came too late to ";
    where() << ": the other ranks have given up waiting for it";
  } else if (!missing.empty()) {
    blamed = missing;
    message << " waited in ";
    where() << " for " << list_ranks(missing) << ", not heard of since: dead, stalled, or running something else";
  } else if (!failure.origins.empty()) {
    blamed = failure.origins;
    message << " cannot end ";
    where() << ": " << list_ranks(failure.origins) << " left the group: " << failure.note;
  } else {
    message << " cannot end ";
    where() << ": a transfer failed, with every rank still there";
  }
  if (!cause.empty()) {
    message << " (" << cause.substr(0, cause.find('\n')) << ")";
  }
  message << rank_note() << ". To go on with all ranks, call torch_ep.reset(group) on each of them";
  close(message.str(), blamed);
  C10_THROW_ERROR(DistError, message.str());
}

}  // namespace ep
