// The connections between the ranks of one communicator: messages between two ranks, waits with a deadline, and failure
// notes, in which a rank that aborts reports the reason to its peers.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace ep {

using Deadline = std::chrono::steady_clock::time_point;

// Runs the handlers of signals that Python has received, and throws what they raise. Does nothing on other threads than
// the main thread.
void run_signal_handlers();

// Note [Channel]
// A communicator does not use the user's process group. It has its own connections: a gloo backend that torch_ep.init
// creates (torch_ep/rendezvous.py). Messages of torch_ep therefore never mix with the program's collectives, a failure
// here does not affect the user's group, and torch_ep.init or reset can reconnect after a failure. Rows of CUDA tensors
// are the exception: the CUDA backend of the user's group transfers them.
//
// Every message has one sender and one receiver, so each rank detects missing peers by itself. Receives of headers are
// posted ahead, two per peer: the header of exchange n + 1 can arrive while this rank is in exchange n. A rank that
// aborts exchange n therefore sends a failure note, as the header of exchange n + 1, before it closes its connections.

// What a rank sends to one peer at the start of an exchange.
struct Header {
  static constexpr size_t kMaxAgreed = 10;
  static constexpr size_t kMaxMessage = 192;  // bytes of a failure message that peers receive
  static constexpr int64_t kUnknown = -1;
  static constexpr int64_t kArrived = 0x65702d6865616421;

  enum State : int64_t {
    kHealthy,
    kFailed,   // the sender failed before the exchange: only headers are exchanged, and the channel stays open
    kAborted,  // a failure note: the sender closed its channel in the exchange before this one
    kClosed,   // the sender closed its channel between exchanges: destroyed, or its process ended
  };

  int64_t op;
  int64_t sequence;
  int64_t state;
  int64_t entered_ns;                     // system clock, which the ranks of a host share
  int64_t send_rows;                      // rows from the sender of this header to its receiver
  int64_t expected_rows;                  // rows that the sender expects from the receiver, or kUnknown
  uint64_t send_digest, expected_digest;  // see Note [One verdict] in exchange.cpp
  // kHealthy: numbers on which all ranks must agree. kAborted: the number of ranks that the sender blames, then these
  // ranks.
  std::array<int64_t, kMaxAgreed> agreed;
  std::array<char, kMaxMessage> message;
  int64_t arrived;  // kArrived once the whole header has arrived: bytes arrive in order
};
static_assert(sizeof(Header) == 344, "bytes per peer, whatever the number of ranks: docs/protocol.md says so");

// Messages in flight.
class Transfers {
 public:
  bool empty() const { return pending_.empty(); }

 private:
  friend class Channel;
  enum class State { pending, done, lost };
  struct Transfer {
    int peer;
    c10::intrusive_ptr<c10d::Work> work;  // keeps its tensor alive
    State state;
    Header* header = nullptr;  // the header that it receives, or nullptr
  };
  std::vector<Transfer> pending_;
};

// Why an exchange cannot go on.
struct Failure {
  std::vector<int> lost;                 // ranks whose connection is gone and that sent no note
  std::vector<int> silent;               // ranks from which nothing came before the deadline
  std::vector<int> note_senders;         // ranks that sent a note
  std::vector<int> blamed;               // ranks that these notes blame
  std::vector<int> origins;              // note senders that blame no rank: the failure was their own
  std::string note;                      // the note of the first origin
  std::chrono::milliseconds stalled{0};  // how long this process did not run, for example while it was stopped
};

class Channel {
 public:
  // An exchange in progress: one at a time per channel.
  class Entry {
   public:
    explicit Entry(Channel& channel);  // waits for exchanges of other threads
    ~Entry();
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;

   private:
    Channel& channel_;
  };

  Channel(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int world_size);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  int64_t sequence() const { return sequence_; }
  // What this rank has sent to its peers.
  struct Traffic {
    int64_t messages = 0, bytes = 0;
  };
  const Traffic& traffic() const { return traffic_; }
  // Bytes of the headers that this rank holds.
  int64_t header_bytes() const { return inboxes_.numel() + outboxes_.numel(); }
  // Why it is closed; empty while it is open.
  const std::string& closed() const { return closed_; }
  // Whether this process was forked from the process that connected.
  bool is_forked() const;
  // Whether this rank knows of a peer that has closed its channel. Never waits.
  bool is_deserted();

  // Starts the next exchange. `fill(peer, header)` fills the header for each peer.
  void send_headers(const std::function<void(int, Header&)>& fill, Deadline deadline);
  // Waits for the headers of that exchange, and sets headers[peer] for each peer. This rank's own element does not
  // change.
  std::optional<Failure> wait_headers(std::vector<Header>& headers, Deadline deadline);

  // `rows`: bytes [rows, width], in the order of the ranks: counts[peer] to or from each peer. Own rows are skipped.
  void send_rows(const at::Tensor& rows, const std::vector<int64_t>& counts, Transfers& transfers);
  void recv_rows(const at::Tensor& rows, const std::vector<int64_t>& counts, Transfers& transfers);
  std::optional<Failure> wait(Transfers& transfers, Deadline deadline);

  // A tensor for the wire rows of the exchange in progress, on the CPU. Memory of up to kKeptBytes stays with the
  // channel for the next exchange: new memory costs a page fault per 4 KiB, more than the copy into it. `which`: 0 or
  // 1.
  at::Tensor wire_buffer(size_t which, at::IntArrayRef sizes, const at::TensorOptions& options);
  static constexpr int64_t kKeptBytes = int64_t{64} << 20;
  // For waits outside the channel: runs signal handlers and polls for an abort of a peer.
  std::optional<Failure> check_peers();

  // Closes all connections between exchanges: this rank leaves the group.
  void leave() noexcept;
  // Sends failure notes and closes all connections. Does nothing if it is already closed.
  void close(const std::string& why, const std::vector<int>& blamed = {}, bool in_exchange = true) noexcept;

 private:
  using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;
  enum class Waited { done, lost, deadline };

  Header& inbox(int64_t sequence, int peer);
  Header& outbox(int64_t sequence, int peer);
  const Header* note_of(int peer);
  bool has_failure_notes();
  c10::intrusive_ptr<c10d::Work> post_send(const at::Tensor& t, int peer, int tag);
  c10::intrusive_ptr<c10d::Work> post_recv(const at::Tensor& t, int peer, int tag);
  void post_headers(int64_t sequence);
  Waited wait_one(Transfers::Transfer& transfer, Transfers& all, Deadline& deadline);
  bool find_lost(Transfers& all);
  std::optional<Failure> wait_all(Transfers& transfers, Deadline deadline);
  Failure failure_of(const Transfers& transfers);
  void disconnect() noexcept;

  c10::intrusive_ptr<c10d::Backend> gloo_;
  const int rank_, world_size_;
  const int64_t pid_;
  int64_t sequence_ = 0;  // exchanges begun
  Traffic traffic_;
  std::string closed_;
  std::timed_mutex mutex_;
  std::atomic<std::thread::id> owner_{};  // thread of the exchange in progress
  // Headers by parity of the exchange, then peer.
  at::Tensor inboxes_, outboxes_;
  std::array<at::Tensor, 2> kept_;
  std::array<Transfers, 2> header_recvs_, header_sends_;
};

}  // namespace ep
