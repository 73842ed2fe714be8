#include "c10d/channel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <numeric>

namespace ep {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// How often a wait runs signal handlers and polls the other peers. Bounds the delay of Ctrl-C and of a timeout.
constexpr milliseconds kTick{100};
// How long a rank that saw a failure waits for the notes of others. They fail at almost the same time.
constexpr milliseconds kGrace{1500};
constexpr milliseconds kPoll{5};
// How long a closing rank waits until its notes are sent. They are small, and their receives are posted.
constexpr milliseconds kFlush{200};
constexpr int kLatePolls = 5;
// Timeout of gloo's own waits, longer than any exchange: gloo closes all connections when such a wait times out.
constexpr milliseconds kNever{std::chrono::hours{24 * 365}};

constexpr int kHeaderTag = 0, kRowsTag = 1, kUnusedTag = 2;

// Wakes all waits once per tick, so that none of gloo's own waits times out. Never destroyed: a wait may outlive main.
class Ticker {
 public:
  static Ticker& get() {
    static auto* ticker = new Ticker();
    return *ticker;
  }

  class Waiting {
   public:
    // `is_late`: the deadline has passed, so wake the wait as soon as it blocks.
    Waiting(const c10::intrusive_ptr<c10d::Work>& work, bool is_late) : work_(work), is_late_(is_late) {
      auto& ticker = get();
      std::lock_guard<std::mutex> lock(ticker.mutex_);
      ticker.waiting_.push_back(work_);
      ticker.late_ += is_late_;
      if (is_late_) {
        ticker.hurry_.notify_one();
      }
    }
    ~Waiting() {
      auto& ticker = get();
      std::lock_guard<std::mutex> lock(ticker.mutex_);
      ticker.late_ -= is_late_;
      ticker.waiting_.erase(std::find(ticker.waiting_.begin(), ticker.waiting_.end(), work_));
    }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    const c10::intrusive_ptr<c10d::Work>& work_;
    const bool is_late_;
  };

  // How long this process did not run when it last stalled; 0 if that was not recently.
  milliseconds stalled() {
    std::lock_guard<std::mutex> lock(mutex_);
    return steady_clock::now() - stall_ended_ < kStallMemory ? stall_ : milliseconds(0);
  }

 private:
  static constexpr milliseconds kHurry{2};
  static constexpr milliseconds kStall{1000};
  static constexpr std::chrono::seconds kStallMemory{10};

  Ticker() {
    std::thread([this] { run(); }).detach();
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      const auto begun = steady_clock::now();
      if (late_ > 0) {
        hurry_.wait_for(lock, kHurry);
      } else {
        hurry_.wait_for(lock, kTick, [this] { return late_ > 0; });
      }
      const auto now = steady_clock::now();
      if (now - begun > kStall) {
        stall_ = std::chrono::duration_cast<milliseconds>(now - begun);
        stall_ended_ = now;
      }
      for (const auto& work : waiting_) {
        work->abort();  // of gloo's send and receive: the wait returns false, the transfer goes on
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable hurry_;
  std::vector<c10::intrusive_ptr<c10d::Work>> waiting_;
  int late_ = 0;
  milliseconds stall_{0};
  Deadline stall_ended_{};
};

at::Tensor make_headers(int world_size) {
  return at::zeros({2, world_size, static_cast<int64_t>(sizeof(Header))}, at::kByte);
}

Header& header_at(const at::Tensor& headers, int64_t sequence, int peer) {
  auto* first = static_cast<Header*>(headers.mutable_data_ptr());
  return first[(sequence & 1) * headers.size(1) + peer];
}

bool has_arrived(Header& header) {
  return std::atomic_ref<int64_t>(header.arrived).load(std::memory_order_acquire) == Header::kArrived;
}

}  // namespace

void run_signal_handlers() {
  if (!Py_IsInitialized()) {
    return;
  }
  const auto gil = PyGILState_Ensure();
  if (PyErr_CheckSignals() != 0) {
    python_error error;
    error.persist();
    PyGILState_Release(gil);
    throw error;
  }
  PyGILState_Release(gil);
}

Channel::Entry::Entry(Channel& channel) : channel_(channel) {
  TORCH_CHECK(
      channel.owner_.load() != std::this_thread::get_id(),
      "torch_ep: expected no operator in a signal handler that interrupts another one on the same group");
  while (!channel.mutex_.try_lock_for(kTick)) {
    run_signal_handlers();
  }
  channel.owner_ = std::this_thread::get_id();
}

Channel::Entry::~Entry() {
  channel_.owner_ = std::thread::id{};
  channel_.mutex_.unlock();
}

Channel::Channel(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int world_size)
    : gloo_(std::move(gloo)),
      rank_(rank),
      world_size_(world_size),
      pid_(getpid()),
      inboxes_(make_headers(world_size)),
      outboxes_(make_headers(world_size)) {
  Ticker::get();
  post_headers(0);
  post_headers(1);
}

Channel::~Channel() {
  if (!is_forked()) {
    leave();
  } else {
    gloo_.release();  // its threads exist only in the parent
  }
}

void Channel::leave() noexcept {
  close("torch_ep.destroy was called there, or its process ended", {}, /*in_exchange=*/false);
}

bool Channel::is_forked() const {
  return pid_ != getpid();
}

bool Channel::is_deserted() {
  for (auto& recvs : header_recvs_) {
    find_lost(recvs);
    for (const auto& transfer : recvs.pending_) {
      if (transfer.state == Transfers::State::lost || note_of(transfer.peer) != nullptr) {
        return true;
      }
    }
  }
  return false;
}

Header& Channel::inbox(int64_t sequence, int peer) {
  return header_at(inboxes_, sequence, peer);
}

Header& Channel::outbox(int64_t sequence, int peer) {
  return header_at(outboxes_, sequence, peer);
}

// nullptr: there is none yet.
const Header* Channel::note_of(int peer) {
  for (const int64_t parity : {0, 1}) {
    auto& header = inbox(parity, peer);
    if (has_arrived(header) && (header.state == Header::kAborted || header.state == Header::kClosed)) {
      return &header;
    }
  }
  return nullptr;
}

// Whether there are failure notes of this exchange. A rank that left between exchanges may have done its part of this
// exchange.
bool Channel::has_failure_notes() {
  for (int peer = 0; peer < world_size_; ++peer) {
    const auto* note = peer == rank_ ? nullptr : note_of(peer);
    if (note != nullptr && note->state == Header::kAborted) {
      return true;
    }
  }
  return false;
}

// post_send and post_recv return nullptr if the connection is gone. They are hidden from profilers: a transfer may
// outlive a profiler's session, and an event that ends after its session corrupts memory (torch 2.13).
c10::intrusive_ptr<c10d::Work> Channel::post_send(const at::Tensor& t, int peer, int tag) {
  std::vector<at::Tensor> tensors{t};
  const at::DisableRecordFunctionGuard unrecorded;
  try {
    return gloo_->send(tensors, peer, tag);
  } catch (const std::exception&) {
    return nullptr;
  }
}

c10::intrusive_ptr<c10d::Work> Channel::post_recv(const at::Tensor& t, int peer, int tag) {
  std::vector<at::Tensor> tensors{t};
  const at::DisableRecordFunctionGuard unrecorded;
  try {
    return gloo_->recv(tensors, peer, tag);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void Channel::post_headers(int64_t sequence) {
  auto& recvs = header_recvs_[sequence & 1].pending_;
  recvs.clear();
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer != rank_) {
      inbox(sequence, peer).arrived = 0;
      auto work = post_recv(inboxes_[sequence & 1][peer], peer, kHeaderTag);
      recvs.push_back({peer, work, work ? Transfers::State::pending : Transfers::State::lost, &inbox(sequence, peer)});
    }
  }
}

void Channel::send_headers(const std::function<void(int, Header&)>& fill, Deadline deadline) {
  const int64_t sequence = sequence_++;
  auto& sends = header_sends_[sequence & 1];
  wait_all(sends, deadline);  // those of the exchange before the last. A failure will show as missing headers.
  sends.pending_.clear();
  // Each rank begins with the next rank, so that not all ranks send to the same rank first.
  for (int step = 1; step < world_size_; ++step) {
    const int peer = (rank_ + step) % world_size_;
    auto& header = outbox(sequence, peer);
    header = Header{};
    header.sequence = sequence;
    fill(peer, header);
    header.arrived = Header::kArrived;
    auto work = post_send(outboxes_[sequence & 1][peer], peer, kHeaderTag);
    ++traffic_.messages;
    traffic_.bytes += sizeof(Header);
    sends.pending_.push_back({peer, work, work ? Transfers::State::pending : Transfers::State::done});
  }
}

std::optional<Failure> Channel::wait_headers(std::vector<Header>& headers, Deadline deadline) {
  const int64_t sequence = sequence_ - 1;
  auto& recvs = header_recvs_[sequence & 1];
  auto failure = wait_all(recvs, deadline);
  for (const auto& transfer : recvs.pending_) {
    if (!failure && note_of(transfer.peer) == &inbox(sequence, transfer.peer)) {
      failure = failure_of(recvs);
    }
  }
  if (failure) {
    return failure;
  }
  headers.resize(world_size_);
  for (const auto& transfer : recvs.pending_) {
    headers[transfer.peer] = inbox(sequence, transfer.peer);
  }
  post_headers(sequence + 2);
  return std::nullopt;
}

void Channel::send_rows(const at::Tensor& rows, const std::vector<int64_t>& counts, Transfers& transfers) {
  std::vector<int64_t> begin(world_size_, 0);
  std::partial_sum(counts.begin(), counts.end() - 1, begin.begin() + 1);
  for (int step = 1; step < world_size_; ++step) {
    const int peer = (rank_ + step) % world_size_;
    if (counts[peer] > 0) {
      auto work = post_send(rows.narrow(0, begin[peer], counts[peer]), peer, kRowsTag);
      ++traffic_.messages;
      traffic_.bytes += counts[peer] * rows.size(1) * static_cast<int64_t>(rows.element_size());
      transfers.pending_.push_back({peer, work, work ? Transfers::State::pending : Transfers::State::lost});
    }
  }
}

void Channel::recv_rows(const at::Tensor& rows, const std::vector<int64_t>& counts, Transfers& transfers) {
  std::vector<int64_t> begin(world_size_, 0);
  std::partial_sum(counts.begin(), counts.end() - 1, begin.begin() + 1);
  for (int step = 1; step < world_size_; ++step) {
    const int peer = (rank_ + world_size_ - step) % world_size_;
    if (counts[peer] > 0) {
      auto work = post_recv(rows.narrow(0, begin[peer], counts[peer]), peer, kRowsTag);
      transfers.pending_.push_back({peer, work, work ? Transfers::State::pending : Transfers::State::lost});
    }
  }
}

at::Tensor Channel::wire_buffer(size_t which, at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes > kKeptBytes) {
    return at::empty(sizes, options);
  }
  auto& kept = kept_[which];
  if (!kept.defined() || kept.size(0) < bytes) {
    kept = at::Tensor();  // freed before the larger one is allocated
    kept = at::empty({bytes}, options.dtype(at::kByte));
  }
  return kept.narrow(0, 0, bytes).view(c10::typeMetaToScalarType(options.dtype())).view(sizes);
}

std::optional<Failure> Channel::wait(Transfers& transfers, Deadline deadline) {
  return wait_all(transfers, deadline);
}

std::optional<Failure> Channel::check_peers() {
  run_signal_handlers();
  auto& next = header_recvs_[sequence_ & 1];
  find_lost(next);
  for (const auto& transfer : next.pending_) {
    if (transfer.state == Transfers::State::lost || note_of(transfer.peer) != nullptr) {
      return failure_of(next);
    }
  }
  return std::nullopt;
}

Channel::Waited Channel::wait_one(Transfers::Transfer& transfer, Transfers& all, Deadline& deadline) {
  int late_polls = 0;
  while (true) {
    // After the deadline, poll again: the transfer may have ended while this rank waited for another one. A wait that
    // is woken before it begins returns false even then, hence several polls. An arrived header always ends the wait.
    const bool is_late = steady_clock::now() >= deadline;
    try {
      const Ticker::Waiting waiting(transfer.work, is_late);
      if (transfer.work->wait(kNever)) {
        return Waited::done;
      }
    } catch (const std::exception&) {
      return Waited::lost;
    }
    if (is_late && (transfer.header == nullptr || !has_arrived(*transfer.header)) && ++late_polls == kLatePolls) {
      return Waited::deadline;
    }
    run_signal_handlers();
    if (!is_late && (find_lost(all) || has_failure_notes())) {
      deadline = std::min(deadline, steady_clock::now() + kGrace);
    }
  }
}

// Marks transfers whose connection is gone, without waiting. Returns whether it found any.
bool Channel::find_lost(Transfers& all) {
  bool found = false;
  for (auto& transfer : all.pending_) {
    if (transfer.state == Transfers::State::pending) {
      try {
        transfer.work->abort();  // makes the next wait return at once
        transfer.work->wait(kNever);
      } catch (const std::exception&) {
        transfer.state = Transfers::State::lost;
        found = true;
      }
    }
  }
  return found;
}

std::optional<Failure> Channel::wait_all(Transfers& transfers, Deadline deadline) {
  bool failed = false;
  for (auto& transfer : transfers.pending_) {
    if (transfer.state == Transfers::State::pending) {
      const auto waited = wait_one(transfer, transfers, deadline);
      if (waited != Waited::deadline) {
        transfer.state = waited == Waited::done ? Transfers::State::done : Transfers::State::lost;
      }
    }
    if (transfer.state == Transfers::State::lost) {
      deadline = std::min(deadline, steady_clock::now() + kGrace);
    }
    failed = failed || transfer.state != Transfers::State::done;
  }
  return failed ? std::optional(failure_of(transfers)) : std::nullopt;
}

Failure Channel::failure_of(const Transfers& transfers) {
  // A silent rank may be about to send a note: it may wait for a third rank and have begun a moment later.
  const auto give_up = steady_clock::now() + kGrace;
  Failure failure;
  const auto add = [](std::vector<int>& ranks, int rank) {
    if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) {
      ranks.push_back(rank);
    }
  };
  while (true) {
    failure = {};
    for (const auto& transfer : transfers.pending_) {
      if (note_of(transfer.peer) == nullptr) {
        if (transfer.state == Transfers::State::lost) {
          add(failure.lost, transfer.peer);
        } else if (transfer.state == Transfers::State::pending) {
          add(failure.silent, transfer.peer);
        }
      }
    }
    if (failure.silent.size() <= 1 || !failure.lost.empty() || steady_clock::now() > give_up) {
      break;
    }
    std::this_thread::sleep_for(kPoll);
  }
  for (int peer = 0; peer < world_size_; ++peer) {
    const auto* note = peer == rank_ ? nullptr : note_of(peer);
    if (note == nullptr) {
      continue;
    }
    failure.note_senders.push_back(peer);
    const auto count = std::clamp<int64_t>(note->agreed[0], 0, Header::kMaxAgreed - 1);
    if (count == 0) {
      if (failure.origins.empty()) {
        failure.note.assign(note->message.data(), strnlen(note->message.data(), note->message.size()));
      }
      failure.origins.push_back(peer);
    }
    for (int64_t i = 1; i <= count; ++i) {
      const auto rank = note->agreed[i];
      if (rank >= 0 && rank < world_size_) {
        add(failure.blamed, static_cast<int>(rank));
      }
    }
  }
  for (auto* ranks : {&failure.lost, &failure.silent, &failure.blamed}) {
    std::sort(ranks->begin(), ranks->end());
  }
  failure.stalled = Ticker::get().stalled();
  return failure;
}

void Channel::close(const std::string& why, const std::vector<int>& blamed, bool in_exchange) noexcept {
  if (!closed_.empty()) {
    return;
  }
  closed_ = why.empty() ? "an error" : why;
  try {
    Transfers notes;
    for (int peer = 0; peer < world_size_; ++peer) {
      if (peer == rank_) {
        continue;
      }
      auto& note = outbox(sequence_, peer);
      note = Header{};
      note.sequence = sequence_;
      note.state = in_exchange ? Header::kAborted : Header::kClosed;
      note.agreed[0] = static_cast<int64_t>(std::min(blamed.size(), Header::kMaxAgreed - 1));
      std::copy_n(blamed.begin(), note.agreed[0], note.agreed.begin() + 1);
      std::strncpy(note.message.data(), closed_.c_str(), note.message.size() - 1);
      note.arrived = Header::kArrived;
      if (auto work = post_send(outboxes_[sequence_ & 1][peer], peer, kHeaderTag)) {
        notes.pending_.push_back({peer, std::move(work), Transfers::State::pending});
      }
    }
    const auto deadline = steady_clock::now() + kFlush;
    for (auto& transfer : notes.pending_) {
      bool is_late = false;
      while (!is_late) {
        is_late = steady_clock::now() >= deadline;
        try {
          const Ticker::Waiting waiting(transfer.work, is_late);
          if (transfer.work->wait(kNever)) {
            break;
          }
        } catch (const std::exception&) {
          break;
        }
      }
    }
    disconnect();
  } catch (...) {
    // Connections that cannot be closed end with the process.
  }
}

// gloo closes all connections of a backend when a wait times out. It has no function for that.
void Channel::disconnect() noexcept {
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer != rank_) {
      try {
        if (const auto work = post_recv(at::empty({1}, at::kByte), peer, kUnusedTag)) {
          work->wait(milliseconds(1));
        }
      } catch (const std::exception&) {
      }
    }
  }
  for (auto* transfers : {&header_recvs_[0], &header_recvs_[1], &header_sends_[0], &header_sends_[1]}) {
    transfers->pending_.clear();
  }
}

}  // namespace ep
