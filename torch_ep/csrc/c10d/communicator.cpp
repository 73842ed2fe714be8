#include "c10d/communicator.h"

#include "c10d/exchange.h"
#include "core/in_flight.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <sstream>

namespace ep {
namespace {

using std::chrono::milliseconds;

std::mutex registry_mutex;
std::map<std::string, std::shared_ptr<Communicator>>& registry() {
  // Never destroyed: an op may still run on another thread while the process exits.
  static auto* communicators = new std::map<std::string, std::shared_ptr<Communicator>>();
  return *communicators;
}
std::string init_hint;

// nullptr: there is none of that name.
std::shared_ptr<Communicator> registered(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(group_name);
  return found == registry().end() ? nullptr : found->second;
}

// nullptr: there are none or several.
std::shared_ptr<Communicator> only_one() {
  std::lock_guard<std::mutex> lock(registry_mutex);
  return registry().size() == 1 ? registry().begin()->second : nullptr;
}

// nullptr: the process group was destroyed, or there never was one of that name.
c10::intrusive_ptr<c10d::ProcessGroup> resolve(const std::string& group_name) {
  try {
    return c10d::resolve_process_group(group_name);
  } catch (const std::exception&) {
    return nullptr;
  }
}

constexpr int64_t kNoLimit = -1;

// Headers hold choices as numbers.
int64_t index_in(std::initializer_list<std::string_view> choices, const std::string& choice) {
  const auto found = std::find(choices.begin(), choices.end(), choice);
  TORCH_INTERNAL_ASSERT(found != choices.end());
  return found - choices.begin();
}

std::string note_of(const std::vector<int64_t>& global_ranks) {
  std::ostringstream note;
  for (size_t rank = 0; rank < global_ranks.size(); ++rank) {
    if (global_ranks[rank] != static_cast<int64_t>(rank)) {
      note << " (ranks 0 to " << global_ranks.size() - 1 << " of this group are global ranks "
           << at::IntArrayRef(global_ranks) << ")";
      break;
    }
  }
  return note.str();
}

bool is_current(const Communicator& comm) {
  const auto group = comm.group.lock();
  return group && resolve(comm.group_name) == group;
}

}  // namespace

bool init_communicator(const std::string& group_name, const std::string& connections, const InitOptions& options) {
  auto group = c10d::resolve_process_group(group_name);
  const int rank = group->getRank(), world_size = group->getSize();
  std::shared_ptr<Channel> channel;
  if (!connections.empty()) {
    auto gloo = c10d::resolve_process_group(connections)->getBackend(c10::kCPU);
    channel = std::make_shared<Channel>(std::move(gloo), rank, world_size);
  } else if (is_connected(group_name)) {
    channel = registered(group_name)->channel;
  } else {
    return false;
  }
  auto comm = std::make_shared<Communicator>(Communicator{
      .group_name = group_name,
      .group = c10::weak_intrusive_ptr<c10d::ProcessGroup>(group),
      .channel = channel,
      .rank = rank,
      .world_size = world_size,
      .timeout = milliseconds(options.timeout_ms),
      .max_hidden = options.hidden.value_or(kNoLimit),
      .max_topk = options.num_topk.value_or(kNoLimit),
      .max_experts = options.num_experts.value_or(kNoLimit),
      .rank_note = note_of(options.global_ranks),
      .global_ranks = options.global_ranks});
  const std::vector<Agreed> agreed{
      {"max_tokens_per_rank", options.max_tokens_per_rank.value_or(kNoLimit)},
      {"hidden", options.hidden.value_or(kNoLimit)},
      {"num_topk", options.num_topk.value_or(kNoLimit)},
      {"num_experts", options.num_experts.value_or(kNoLimit)},
      {"timeout in ms", options.timeout_ms},
      {"backend (0: auto, 1: c10d, 2: nvlink)", index_in({"auto", "c10d", "nvlink"}, options.backend)},
      {"provider (0: torch, 1: nvshmem)", index_in({"torch", "nvshmem"}, options.provider)},
      {"num_sms", options.num_sms},
      {"low_latency_tokens (0: None)", options.low_latency_tokens.value_or(0)},
      {"on_timeout (0: raise, 1: mask)", index_in({"raise", "mask"}, options.on_timeout)}};
  const auto begun = std::chrono::steady_clock::now();
  try {
    Exchange exchange(comm, OpKind::init, std::vector<int64_t>(world_size, 0), {}, agreed);
    exchange.confirm();
    exchange.finish();
  } catch (const c10::DistError&) {
    // One rank may have closed the earlier connections and wait for new ones.
    const bool in_time = std::chrono::steady_clock::now() - begun < comm->timeout;
    if (connections.empty() && !channel->closed().empty() && in_time) {
      return false;
    }
    throw;
  }
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[group_name] = comm;
  init_hint.clear();
  return true;
}

bool is_connected(const std::string& group_name) {
  const auto comm = registered(group_name);
  if (!comm || !is_current(*comm) || comm->channel->is_forked()) {
    return false;
  }
  const Channel::Entry entry(*comm->channel);
  return comm->channel->closed().empty() && !comm->channel->is_deserted();
}

void destroy_communicator(const std::string& group_name) {
  drop_in_flight(group_name);
  // Destroyed after the lock is released: the destructor closes the channel to the peers.
  std::shared_ptr<Communicator> last;
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(group_name);
  if (found != registry().end()) {
    last = std::move(found->second);
    registry().erase(found);
  }
}

std::vector<std::string> orphaned_communicators() {
  std::vector<std::shared_ptr<Communicator>> all;
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    for (const auto& [name, comm] : registry()) {
      all.push_back(comm);
    }
  }
  std::vector<std::string> names;
  for (const auto& comm : all) {
    if (!is_current(*comm)) {
      names.push_back(comm->group_name);
    }
  }
  return names;
}

void hint_at_init(const std::string& hint) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  init_hint = hint;
}

std::shared_ptr<Communicator> find_communicator(OpKind op, const std::string& group_name, int64_t world_size) {
  auto comm = registered(group_name);
  TORCH_CHECK(
      comm,
      name_of(op),
      ": expected an initialized group, got group '",
      group_name,
      "': call torch_ep.init(group) on every rank first",
      resolve(group_name) ? init_hint : "");
  TORCH_CHECK(
      !comm->channel->is_forked(),
      name_of(op),
      ": group '",
      group_name,
      "' was initialized in the process that this one was forked from: its connections stay there. Create a process "
      "group in this process, then call torch_ep.init(group)");
  TORCH_CHECK(
      is_current(*comm),
      name_of(op),
      ": group '",
      group_name,
      "' was destroyed or re-created since torch_ep.init: call torch_ep.init(group) on every rank again");
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

std::shared_ptr<Communicator> guess_communicator(const std::string& group_name) {
  auto comm = registered(group_name);
  return comm || group_name.empty() ? comm : only_one();
}

void send_failure(OpKind op, const std::shared_ptr<Communicator>& comm, const std::string& failure) {
  if (!comm || comm->channel->is_forked() || !is_current(*comm) || !comm->channel->closed().empty()) {
    return;
  }
  try {
    Exchange(comm, op, std::vector<int64_t>(comm->world_size, 0), {}, {}, failure).confirm();
  } catch (const c10::Error&) {
    // A rank is missing. The error that was to be sent says more.
  }
}

}  // namespace ep
