// Communicators: what torch_ep.init agreed on for a group, found again by the operators through the group's name.
#pragma once

#include "c10d/channel.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace ep {

// What an exchange is for. Every rank must issue the same sequence of these on one group.
// The halves of a low-latency operator are one exchange: that of `_send`.
enum class OpKind : int64_t {
  init = 0,
  plan = 1,
  dispatch = 2,
  combine = 3,
  low_latency_dispatch = 4,
  low_latency_combine = 5
};

const char* name_of(OpKind op);
OpKind kind_of(const std::string& name);  // of an operator

// One rank's end of a group.
struct Communicator {
  std::string group_name;
  // Tells a re-created group from the one of `init`. Weak: the group may go, but its address is not used again.
  c10::weak_intrusive_ptr<c10d::ProcessGroup> group;
  std::shared_ptr<Channel> channel;
  int rank;
  int world_size;
  std::chrono::milliseconds timeout;
  // Of `init`; -1: no limit. max_tokens_per_rank is an argument of the plan, since shapes depend on it.
  int64_t max_hidden, max_topk, max_experts;
};

// Throws if `got` is above a limit of `init`.
void check_limit(OpKind op, const char* name, int64_t limit, int64_t got);

// Collective. Throws unless every rank of the group passes the same numbers. `connections`: the name of a process group
// whose CPU backend becomes the communicator's channel; empty: use the channel of the group's earlier communicator, and
// return false if there is none that all ranks are still on.
// `choice`: backend, provider, num_sms, low_latency_tokens and on_timeout, as numbers.
bool init_communicator(
    const std::string& group_name,
    const std::string& connections,
    int64_t timeout_ms,
    at::IntArrayRef limits,
    at::IntArrayRef choice);
// Whether the group has a communicator that all ranks are still on, as far as this rank has heard. Local.
bool is_connected(const std::string& group_name);
// Local; a name without a communicator is not an error.
void destroy_communicator(const std::string& group_name);
// Names of communicators whose process group is gone.
std::vector<std::string> orphaned_communicators();
// A sentence for the error about a missing communicator, when the program has called torch_ep.init too early.
void hint_at_init(const std::string& hint);

// nullptr for one rank. Throws if the group was not initialized or its size is not `world_size`; the other ranks are
// told.
std::shared_ptr<Communicator> find_communicator(const std::string& group_name, int64_t world_size, OpKind op);

// Tells the other ranks, which are in `op` or will come to it, that this rank failed before it. Collective with their
// exchange. Throws nothing but what a signal handler raises. nullptr: there are no other ranks.
void tell_failure(OpKind op, const std::shared_ptr<Communicator>& comm, const std::string& failure);
// By the group's name, before it is known how its rows travel: no one is told if it has a backend of its own. A group
// that does not exist can only be a mistake for another one: if there is just one, its ranks are told.
void tell_failure(OpKind op, c10::string_view group_name, const std::string& failure);

// Returns what `check` does. An error on this rank alone is told to the other ranks of a communicator or a group, which
// would wait for this rank until they time out.
template <class Peers, class Check>
auto or_tell(OpKind op, const Peers& peers, const Check& check) {
  try {
    return check();
  } catch (const std::exception& error) {
    tell_failure(op, peers, message_of(error));
    throw;
  }
}

}  // namespace ep
