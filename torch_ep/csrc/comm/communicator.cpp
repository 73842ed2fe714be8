#include "communicator.h"

#include "transport.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <sstream>
#include <thread>

namespace ep {
namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::steady_clock;
using std::chrono::system_clock;

// How long a wait lasts before this rank publishes in the group's store where it stands, and how long a rank that saw
// a failure gives the others to do the same. Short against any useful timeout, long against any healthy exchange.
constexpr milliseconds kPublishAfter{1000};
constexpr milliseconds kPoll{20};
// Published behind its progress by a rank whose exchange failed: it comes to no later one.
constexpr const char* kFailed = " failed";

std::mutex registry_mutex;
std::map<std::string, std::shared_ptr<Communicator>>& registry() {
  // Never destroyed: an op may still run on another thread while the process exits.
  static auto* communicators = new std::map<std::string, std::shared_ptr<Communicator>>();
  return *communicators;
}

// nullptr: there is none of that name.
std::shared_ptr<Communicator> registered(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(group_name);
  return found == registry().end() ? nullptr : found->second;
}

std::string list_ranks(const std::vector<int>& ranks) {
  std::ostringstream out;
  out << (ranks.size() == 1 ? "rank " : "ranks ");
  for (size_t i = 0; i < ranks.size(); ++i) {
    out << (i ? ", " : "") << ranks[i];
  }
  return out.str();
}

std::string store_key(const Communicator& comm, int rank) {
  return "torch_ep/" + std::to_string(comm.generation) + "/" + std::to_string(rank);
}

// Headers travel on the CPU where the group has a CPU backend, so that no device is waited for.
c10::DeviceType header_device(c10d::ProcessGroup& group) {
  const auto devices = group.getDeviceTypes();
  for (const auto& device : devices) {
    if (device.type() == c10::kCPU) {
      return c10::kCPU;
    }
  }
  return devices.empty() ? c10::kCPU : devices.front().type();
}

}  // namespace

const char* name_of(OpKind op) {
  switch (op) {
    case OpKind::init:
      return "torch_ep.init";
    case OpKind::plan:
      return "ep::plan";
    case OpKind::dispatch:
      return "ep::dispatch";
    case OpKind::combine:
      return "ep::combine";
    case OpKind::low_latency_dispatch:
      return "ep::low_latency_dispatch";
    case OpKind::low_latency_combine:
      return "ep::low_latency_combine";
  }
  return "an unknown op";
}

void check_limit(OpKind op, const char* name, int64_t limit, int64_t got) {
  TORCH_CHECK_VALUE(
      limit < 0 || got <= limit,
      name_of(op),
      ": expected at most ",
      name,
      " = ",
      limit,
      ", the limit given to torch_ep.init, got ",
      got);
}

void init_communicator(
    const std::string& group_name,
    int64_t timeout_ms,
    at::IntArrayRef limits,
    at::IntArrayRef choice) {
  static std::map<std::string, int64_t> generations;
  auto group = c10d::resolve_process_group(group_name);
  auto comm =
      std::make_shared<Communicator>(Communicator{group_name, c10::weak_intrusive_ptr<c10d::ProcessGroup>(group)});
  comm->rank = group->getRank();
  comm->world_size = group->getSize();
  comm->timeout = milliseconds(timeout_ms);
  TORCH_INTERNAL_ASSERT(limits.size() == 4 && choice.size() == 5);
  comm->max_hidden = limits[1];
  comm->max_topk = limits[2];
  comm->max_experts = limits[3];
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    comm->generation = ++generations[group_name];
  }
  const auto earlier = registered(group_name);
  comm->has_failed = earlier && earlier->has_failed && earlier->group.lock() == group;
  Exchange exchange(
      comm,
      OpKind::init,
      std::vector<int64_t>(comm->world_size, 0),
      {},
      {{"max_tokens_per_rank", limits[0]},
       {"hidden", limits[1]},
       {"num_topk", limits[2]},
       {"num_experts", limits[3]},
       {"timeout in ms", timeout_ms},
       {"transport (0: auto, 1: c10d, 2: nvlink)", choice[0]},
       {"provider (0: torch, 1: nvshmem)", choice[1]},
       {"num_sms", choice[2]},
       {"low_latency_tokens (0: None)", choice[3]},
       {"on_timeout (0: raise, 1: mask)", choice[4]}});
  exchange.confirm();
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[group_name] = comm;
}

void destroy_communicator(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry().erase(group_name);
}

std::shared_ptr<Communicator> find_communicator(const std::string& group_name, int64_t world_size, OpKind op) {
  if (world_size == 1) {
    return nullptr;
  }
  auto comm = registered(group_name);
  TORCH_CHECK(
      comm,
      name_of(op),
      ": expected an initialised group, got group '",
      group_name,
      "': call torch_ep.init(group) on every rank first");
  TORCH_CHECK(
      c10d::resolve_process_group(group_name) == comm->group.lock(),
      name_of(op),
      ": group '",
      group_name,
      "' was re-created since torch_ep.init: call torch_ep.init(group) on every rank again");
  TORCH_CHECK_VALUE(
      comm->world_size == world_size,
      name_of(op),
      ": expected world_size ",
      comm->world_size,
      " (the size of group '",
      group_name,
      "'), got ",
      world_size);
  return comm;
}

void tell_failure(OpKind op, const std::shared_ptr<Communicator>& comm, const std::string& failure) noexcept {
  try {
    if (comm && c10d::resolve_process_group(comm->group_name) == comm->group.lock()) {
      Exchange(comm, op, std::vector<int64_t>(comm->world_size, 0), {}, {}, failure).confirm();
    }
  } catch (const std::exception&) {
    // A rank that does not come. What is to be told says more.
  }
}

void tell_failure(OpKind op, c10::string_view group_name, const std::string& failure) noexcept {
  const std::string name(group_name);
  if (!has_transport(name)) {
    tell_failure(op, registered(name), failure);
  }
}

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
      sequence_(comm_->sequence++),
      send_rows_(std::move(send_rows)),
      agreed_(agreed),
      failed_(failure.has_value()),
      deadline_(steady_clock::now() + comm_->timeout) {
  TORCH_INTERNAL_ASSERT(agreed.size() <= kMaxAgreed);
  const int64_t world_size = comm_->world_size;
  const int64_t numbers = 2 * world_size;
  const int64_t bytes = static_cast<int64_t>(sizeof(Header) + numbers * sizeof(int64_t));
  auto own = at::zeros({1, bytes}, at::kByte);
  auto& header = *reinterpret_cast<Header*>(own.mutable_data_ptr());
  header.op = static_cast<int64_t>(op_);
  header.sequence = sequence_;
  header.failed = failed_;
  header.entered_ns = duration_cast<nanoseconds>(system_clock::now().time_since_epoch()).count();
  for (size_t i = 0; i < agreed.size(); ++i) {
    header.agreed[i] = agreed[i].value;
  }
  if (failure) {
    std::strncpy(header.message.data(), failure->c_str(), header.message.size() - 1);
  }
  auto* rows = reinterpret_cast<int64_t*>(&header + 1);
  std::copy(send_rows_.begin(), send_rows_.end(), rows);
  std::fill(rows + world_size, rows + numbers, kUnknown);
  std::copy(recv_rows.begin(), recv_rows.end(), rows + world_size);

  headers_in_ = own.expand({world_size, bytes}).contiguous().to(header_device(*group_));
  headers_out_ = at::empty_like(headers_in_);
  std::vector<int64_t> even;
  c10d::AllToAllOptions options;
  options.timeout = comm_->timeout;
  header_work_ = group_->alltoall_base(headers_out_, headers_in_, even, even, options);
}

std::vector<int64_t> Exchange::confirm() {
  await(header_work_, headers_out_.is_cpu(), Phase::headers);
  if (failed_) {
    return {};
  }
  const auto host = headers_out_.cpu();
  const int rank = comm_->rank, world_size = comm_->world_size;
  const auto header = [&](int peer) -> const Header& {
    return *reinterpret_cast<const Header*>(static_cast<const char*>(host.const_data_ptr()) + peer * host.size(1));
  };
  const auto sends = [&](int from, int to) { return reinterpret_cast<const int64_t*>(&header(from) + 1)[to]; };
  const auto expects = [&](int at, int from) { return sends(at, world_size + from); };
  std::ostringstream message;
  const auto fail = [&] { C10_THROW_ERROR(DistError, message.str()); };
  message << name_of(op_) << ": ";

  for (int peer = 0; peer < world_size; ++peer) {
    const auto& h = header(peer);
    if (h.op != static_cast<int64_t>(op_) || h.sequence != sequence_) {
      message << "ranks issued different sequences of operators on group '" << comm_->group_name << "': rank " << rank
              << " is in " << name_of(op_) << " (exchange " << sequence_ << "), rank " << peer << " in "
              << name_of(static_cast<OpKind>(h.op)) << " (exchange " << h.sequence << ")";
      fail();
    }
  }
  for (int peer = 0; peer < world_size; ++peer) {
    const auto& h = header(peer);
    if (h.failed) {
      message << "rank " << peer << " failed before exchange " << sequence_ << ": " << h.message.data();
      fail();
    }
    for (size_t i = 0; i < agreed_.size(); ++i) {
      if (h.agreed[i] != agreed_[i].value) {
        const auto show = [&](int64_t value) {
          return agreed_[i].is_dtype ? std::string(c10::toString(static_cast<at::ScalarType>(value)))
                                     : std::to_string(value);
        };
        message << "expected the same " << agreed_[i].name << " on every rank, got " << show(agreed_[i].value)
                << " on rank " << rank << " and " << show(h.agreed[i]) << " on rank " << peer;
        fail();
      }
    }
  }
  for (int from = 0; from < world_size; ++from) {
    for (int to = 0; to < world_size; ++to) {
      if (expects(to, from) != kUnknown && expects(to, from) != sends(from, to)) {
        message << "expected the same plan on every rank, got one by which " << expects(to, from)
                << " rows go from rank " << from << " to rank " << to << ", where rank " << from << " sends "
                << sends(from, to);
        fail();
      }
    }
  }
  std::vector<int64_t> recv_rows(world_size);
  wait_ns_.resize(world_size);
  for (int peer = 0; peer < world_size; ++peer) {
    recv_rows[peer] = sends(peer, rank);
    wait_ns_[peer] = std::max<int64_t>(0, header(peer).entered_ns - header(rank).entered_ns);
  }
  return recv_rows;
}

void Exchange::start(const at::Tensor& output, const at::Tensor& input, const std::vector<int64_t>& recv_rows) {
  if (input.size(1) == 0) {
    return;  // rows of width zero, on every rank: the headers agreed
  }
  // As rows of bytes, an all-to-all needs to know no dtype.
  auto out = output.view(at::kByte);
  auto in = input.view(at::kByte);
  auto output_splits = recv_rows;
  auto input_splits = send_rows_;
  c10d::AllToAllOptions options;
  options.timeout = comm_->timeout;
  transfers_.push_back({group_->alltoall_base(out, in, output_splits, input_splits, options), output, input});
}

void Exchange::finish() {
  for (const auto& transfer : transfers_) {
    await(transfer.work, transfer.output.is_cpu(), Phase::rows);
  }
  transfers_.clear();
}

// Note [Waiting with a name]
// The backend's own time-out says that something did not arrive, not from whom. So a rank that waits for long, or whose
// exchange failed, publishes in the group's store how far it came; whoever then has to report the failure names the
// ranks that published nothing as late, but for those that failed themselves an exchange before. On the way that
// matters, where all goes well, the store is never touched.
void Exchange::await(const c10::intrusive_ptr<c10d::Work>& work, bool on_cpu, Phase phase) {
  bool published = false;
  const auto publish = [&](const char* mark) {
    published = true;
    try {
      group_->getStore()->set(store_key(*comm_, comm_->rank), std::to_string(progress(phase)) + mark);
    } catch (const std::exception&) {
      // The store went away with the rank that kept it; `blame` finds that out again and says so.
    }
  };
  const auto publish_at = steady_clock::now() + kPublishAfter;
  try {
    if (on_cpu) {
      // Under a backend that waits on the host, the time-out is the backend's, given with the options.
      try {
        work->wait(kPublishAfter);
      } catch (const std::exception&) {
        if (work->isCompleted()) {
          throw;
        }
        publish("");
        work->wait();
      }
      return;
    }
    while (!work->isCompleted()) {
      const auto now = steady_clock::now();
      if (now > deadline_) {
        C10_THROW_ERROR(DistError, "timed out");
      }
      if (now > publish_at && !published) {
        publish("");
      }
      std::this_thread::yield();
    }
    work->wait();  // orders the current stream after the transfer; rethrows the backend's own error
  } catch (const std::exception& error) {
    publish(kFailed);
    const auto message = blame(phase, error.what());
    comm_->has_failed = true;
    C10_THROW_ERROR(DistError, message);
  }
}

std::string Exchange::blame(Phase phase, const std::string& cause) {
  const auto told = ". The backend said: " + cause.substr(0, cause.find('\n'));
  if (comm_->has_failed && steady_clock::now() < deadline_) {
    return std::string(name_of(op_)) + ": group '" + comm_->group_name +
           "' is closed since an exchange on it failed: make the process group anew, then call torch_ep.init(group) on "
           "every rank" +
           told;
  }
  std::vector<int> late;
  bool store_lost = false;
  // A rank that is in this exchange publishes within kPublishAfter; one that comes to it later fails at once and does
  // so too. Where only one rank is left unheard of, nothing is gained by waiting longer.
  const auto give_up = std::max(deadline_, steady_clock::now() + kPublishAfter) + kPublishAfter;
  while (true) {
    late.clear();
    try {
      auto store = group_->getStore();
      for (int peer = 0; peer < comm_->world_size; ++peer) {
        const auto key = store_key(*comm_, peer);
        if (peer == comm_->rank) {
          continue;
        }
        const auto heard = store->check({key}) ? store->get_to_str(key) : "-1";
        if (std::stoll(heard) < progress(phase) && heard.find(kFailed) == std::string::npos) {
          late.push_back(peer);
        }
      }
    } catch (const std::exception&) {
      store_lost = true;
      break;
    }
    if (late.size() <= 1 || steady_clock::now() > give_up) {
      break;
    }
    std::this_thread::sleep_for(kPoll);
  }
  std::ostringstream message;
  message << name_of(op_) << ": rank " << comm_->rank << " waited in exchange " << sequence_ << " of group '"
          << comm_->group_name << "' (" << (phase == Phase::headers ? "headers" : "rows") << ", time-out "
          << comm_->timeout.count() << " ms) for ";
  if (store_lost) {
    message << "a rank that is gone; the group's store is gone too, so it is likely the one that keeps it (rank 0)";
  } else if (late.empty()) {
    message << "a transfer that failed although every rank had reached it";
  } else {
    message << list_ranks(late) << ", not heard of since: dead, stalled, or running something else";
  }
  message << told;
  return message.str();
}

}  // namespace ep
