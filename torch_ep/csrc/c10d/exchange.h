// One exchange of the c10d backend: headers on which all ranks agree, then rows.
#pragma once

#include "c10d/communicator.h"
#include "local/row_exchange.h"

namespace ep {

// Note [One exchange]
// Every rank sends a header to every peer: operator, sequence number, the numbers on which all ranks must agree, the
// rows that it sends to and expects from that peer, and whether it failed before it could send any. No data is sent
// before all headers agree. All ranks come to the same verdict. So a rank that runs another operator, passes other
// sizes or has a bad argument causes an error on every rank in the same exchange, and the group stays usable.
//
// Allocate as much as possible before the exchange begins. An error between its start and its end closes the channel:
// the other ranks get a failure note instead of rows, and later calls on this rank throw.
class Exchange final : public RowExchange {
 public:
  // Starts the headers and returns at once. `send_rows[r]`: rows that this rank will send to r; `recv_rows[r]`: rows
  // that it expects from r, empty if only the headers determine them. `failure`: this rank's own error, for its peers.
  Exchange(
      std::shared_ptr<Communicator> comm,
      OpKind op,
      std::vector<int64_t> send_rows,
      const std::vector<int64_t>& recv_rows,
      const std::vector<Agreed>& agreed,
      const std::optional<std::string>& failure = std::nullopt);
  ~Exchange() override;
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Waits for the headers and checks them. Returns the rows that each rank will send here; empty on a rank that failed
  // itself: its own error says more.
  std::vector<int64_t> confirm() override;

  int64_t rank() const override { return comm_->rank; }
  const std::vector<int64_t>& wait_ns() const override { return wait_ns_; }

  size_t start(
      const at::Tensor& output,
      const at::Tensor& input,
      const std::vector<int64_t>& recv_rows,
      bool has_own_rows) override;
  void wait(size_t transfer) override;
  void finish() override;
  void suspend() override { entry_.reset(); }
  void resume() override;

  void abort(const std::string& why) override { close(why); }

 private:
  enum class Phase { headers, rows };

  // Rows in flight.
  struct Transfer {
    Transfers messages;                          // of CPU rows, on the channel
    c10::intrusive_ptr<c10d::Work> device_work;  // of CUDA rows, on the group's own backend
    at::Tensor output, input;                    // alive until the transfer ends
  };

  // A rank as errors name it: on a rail or in a node by its global rank, since these errors travel to other groups.
  int64_t shown(int rank) const;
  std::string list_ranks(const std::vector<int>& ranks) const;
  // What an error ends with.
  std::string rank_note() const;
  void await_device(const c10::intrusive_ptr<c10d::Work>& work);
  void check_closed() const;
  void close(const std::string& why, const std::vector<int>& blamed = {});
  [[noreturn]] void fail(Phase phase, const Failure& failure, const std::string& cause = "");

  std::shared_ptr<Communicator> comm_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  OpKind op_;
  std::optional<Channel::Entry> entry_;  // empty while suspended
  int64_t sequence_ = 0;
  std::vector<int64_t> send_rows_, expected_rows_;
  std::vector<Agreed> agreed_;
  bool failed_;
  bool is_over_ = false;
  Deadline deadline_;
  int64_t entered_ns_ = 0;
  std::vector<int64_t> wait_ns_;
  std::vector<Transfer> transfers_;
};

}  // namespace ep
