// Communicators: the state that torch_ep.init creates for a group. Operators find it by the group's name.
#pragma once

#include "c10d/channel.h"
#include "core/types.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace ep {

// A group as one of its ranks uses it.
struct Communicator {
  std::string group_name;
  // Distinguishes a re-created group from the group of `init`. Weak: the group may be destroyed, but its address is not
  // reused.
  c10::weak_intrusive_ptr<c10d::ProcessGroup> group;
  std::shared_ptr<Channel> channel;
  int rank;
  int world_size;
  std::chrono::milliseconds timeout;
  // Limits of `init`; -1: none. max_tokens_per_rank is an argument of the plan, since shapes depend on it.
  int64_t max_hidden, max_topk, max_experts;
  // For errors: which global ranks the group's ranks are. "" if they are the same.
  std::string rank_note;
  std::vector<int64_t> global_ranks;  // in torch.distributed, by rank of the group
};

// Options of torch_ep.init, on which all ranks must agree.
struct InitOptions {
  int64_t timeout_ms;
  std::optional<int64_t> max_tokens_per_rank, hidden, num_topk, num_experts, low_latency_tokens;
  std::string backend;
  int64_t num_sms;
  std::string provider, on_timeout;
  std::vector<int64_t> global_ranks;  // of each rank of the group, in torch.distributed
};

// Collective. Throws unless every rank of the group passes the same options. `connections`: the name of a process group
// whose CPU backend becomes the communicator's channel; empty: use the channel of the group's earlier communicator, and
// return false if there is none to which all ranks are still connected.
bool init_communicator(const std::string& group_name, const std::string& connections, const InitOptions& options);
// Whether the group has a communicator to which all ranks are still connected, as far as this rank knows. Local.
bool is_connected(const std::string& group_name);
// Local; a name without a communicator is not an error.
void destroy_communicator(const std::string& group_name);
// Names of communicators whose process group is gone.
std::vector<std::string> orphaned_communicators();
// A sentence for the error about a missing communicator, when the program has called torch_ep.init too early.
void hint_at_init(const std::string& hint);

// Throws if the group was not initialized, was re-created since, or its size is not `world_size`.
std::shared_ptr<Communicator> find_communicator(OpKind op, const std::string& group_name, int64_t world_size);
// The communicator to which an error about `group_name` is sent. If there is no such group but exactly one other, it is
// that one. nullptr: none.
std::shared_ptr<Communicator> guess_communicator(const std::string& group_name);

// Sends this rank's own error to the other ranks, which are in `op` or will come to it. Collective with their exchange.
// Throws nothing except what a signal handler raises.
void send_failure(OpKind op, const std::shared_ptr<Communicator>& comm, const std::string& failure);

}  // namespace ep
