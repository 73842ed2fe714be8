// Communicators and exchanges of the c10d transport: how bytes reach a peer through any ProcessGroup.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <array>
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

// A number on which all ranks of an exchange must agree, with the name that an error calls it by.
struct Agreed {
  const char* name;
  int64_t value;
  bool is_dtype = false;  // the value is an at::ScalarType
};

// One rank's end of a group, made by `torch_ep.init` and found again through the group's name.
struct Communicator {
  std::string group_name;
  // Tells a re-created group from the one of `init`. Weak: the group may go, but its address is not used again.
  c10::weak_intrusive_ptr<c10d::ProcessGroup> group;
  int rank;
  int world_size;
  int64_t generation;  // how often this process called `init` on this name: keeps old store keys apart
  std::chrono::milliseconds timeout;
  // Of `init`; -1: no limit. max_tokens_per_rank is an argument of the plan, since shapes depend on it.
  int64_t max_hidden, max_topk, max_experts;
  int64_t sequence = 0;     // exchanges begun
  bool has_failed = false;  // one of them, or of an earlier communicator on the same process group
};

// Throws if `got` is above a limit of `init`.
void check_limit(OpKind op, const char* name, int64_t limit, int64_t got);

// Collective. Throws unless every rank of the group passes the same numbers.
// `choice`: transport, provider, num_sms, low_latency_tokens and on_timeout, as numbers.
void init_communicator(
    const std::string& group_name,
    int64_t timeout_ms,
    at::IntArrayRef limits,
    at::IntArrayRef choice);
// Local; a name that is not initialised is not an error.
void destroy_communicator(const std::string& group_name);
// nullptr for one rank. Throws if the group was not initialised or its size is not `world_size`.
std::shared_ptr<Communicator> find_communicator(const std::string& group_name, int64_t world_size, OpKind op);

// Note [One exchange]
// An exchange starts with a header that every rank sends to every other: op kind, sequence number, the numbers on which
// they must agree, the rows that it sends to and expects from each rank, and whether it failed before it could send
// any. Only when all headers agree does a byte of data move. All ranks see the same headers, so all come to the same
// verdict: a rank that runs another op, passes other sizes or has a bad argument becomes an error on every rank in the
// same exchange, and the group stays usable, since all of them took part in the same all-to-all.
class Exchange {
 public:
  static constexpr size_t kMaxAgreed = 10;
  static constexpr size_t kMaxMessage = 192;  // bytes of a failed rank's message that travel to its peers

  // Starts the headers' all-to-all and returns at once. `send_rows[r]`: rows that this rank will send to r;
  // `recv_rows[r]`: rows that it expects from r, empty if only the headers will tell.
  // `failure`: this rank's own error; its peers are told.
  Exchange(
      std::shared_ptr<Communicator> comm,
      OpKind op,
      std::vector<int64_t> send_rows,
      const std::vector<int64_t>& recv_rows,
      const std::vector<Agreed>& agreed,
      const std::optional<std::string>& failure = std::nullopt);

  // Waits for the headers and checks them. Returns the rows that each rank will send here. Throws nothing but time-outs
  // on a rank that failed itself: its own error says more.
  std::vector<int64_t> confirm();

  // After `confirm`: how much later than this rank each rank came to this exchange, in ns, 0 for the earlier ones.
  // Between hosts it is as exact as their clocks.
  const std::vector<int64_t>& wait_ns() const { return wait_ns_; }

  // Starts moving rows [n, width]: `input` holds those for rank 0 first. Both contiguous, of one width and dtype.
  void start(const at::Tensor& output, const at::Tensor& input, const std::vector<int64_t>& recv_rows);
  // Waits for everything started.
  void finish();

 private:
  struct Header {
    int64_t op;
    int64_t sequence;
    int64_t failed;
    int64_t entered_ns;  // of the system's clock, which the ranks of a host share
    std::array<int64_t, kMaxAgreed> agreed;
    std::array<char, kMaxMessage> message;
    // Then int64 [world_size] rows to each rank and int64 [world_size] rows expected from each, kUnknown if not known.
  };
  static constexpr int64_t kUnknown = -1;

  enum class Phase : int64_t { headers, rows };

  struct Transfer {
    c10::intrusive_ptr<c10d::Work> work;
    at::Tensor output, input;  // alive until the transfer ends
  };

  // Grows with every step that a rank takes: what it publishes when it has to wait for long.
  int64_t progress(Phase phase) const { return 2 * sequence_ + static_cast<int64_t>(phase); }
  void await(const c10::intrusive_ptr<c10d::Work>& work, bool on_cpu, Phase phase);
  std::string blame(Phase phase, const std::string& cause);

  std::shared_ptr<Communicator> comm_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  OpKind op_;
  int64_t sequence_ = 0;
  std::vector<int64_t> send_rows_;
  std::vector<Agreed> agreed_;
  bool failed_;
  at::Tensor headers_out_, headers_in_;
  std::chrono::steady_clock::time_point deadline_;
  c10::intrusive_ptr<c10d::Work> header_work_;
  std::vector<int64_t> wait_ns_;
  std::vector<Transfer> transfers_;
};

// Tells the other ranks, which are in `op` or will come to it, that this one failed before it. Throws nothing. nullptr:
// there are none.
void tell_failure(OpKind op, const std::shared_ptr<Communicator>& comm, const std::string& failure) noexcept;
// The same before it is known how the rows of that group travel: nobody is told where it has a transport of its own.
void tell_failure(OpKind op, c10::string_view group_name, const std::string& failure) noexcept;

// Returns what `check` does. What is wrong on one rank alone is told to the others, a communicator's or a group's,
// which would wait in vain otherwise.
template <class Peers, class Check>
auto or_tell(OpKind op, const Peers& peers, const Check& check) {
  try {
    return check();
  } catch (const c10::Error& error) {
    tell_failure(op, peers, error.what_without_backtrace());
    throw;
  }
}

}  // namespace ep
