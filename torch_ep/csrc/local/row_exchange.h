// The interface of an exchange of wire rows, for composed backends.
#pragma once

#include "core/types.h"

#include <memory>
#include <vector>

namespace ep {

// A number on which all ranks of an exchange must agree, and its name in errors.
struct Agreed {
  const char* name;
  int64_t value;
  bool is_dtype = false;  // the value is an at::ScalarType
};

// One exchange of wire rows. The constructor begins it.
class RowExchange {
 public:
  virtual ~RowExchange() = default;

  // Waits until all ranks agree on this exchange. Returns the rows that each rank will send here.
  virtual std::vector<int64_t> confirm() = 0;
  // Starts to transfer rows [n, width]. `sent` is in the order of the destination ranks, `received` in the order of the
  // source ranks. Both are contiguous and have the same width and dtype. Returns a number for `wait`.
  // `has_own_rows`: `received` has the rows that stay on this rank already, and those of `sent` are not read.
  virtual size_t start(
      const at::Tensor& received,
      const at::Tensor& sent,
      const std::vector<int64_t>& recv_rows,
      bool has_own_rows = false) = 0;
  // Waits for one of the transfers that were started.
  virtual void wait(size_t transfer) = 0;
  // Waits for everything started. The exchange ends here.
  virtual void finish() = 0;
  // Between these, other exchanges may run while the rows that were started travel. After `resume`, the waits have the
  // whole timeout. Throws if the group was closed meanwhile.
  virtual void suspend() = 0;
  virtual void resume() = 0;
  // This rank in the group.
  virtual int64_t rank() const = 0;
  // Aborts an exchange that this rank cannot finish, and reports the reason to the peers.
  virtual void abort(const std::string& why) = 0;
  // After `confirm`: per rank, how much later than this rank it entered the exchange, in ns; 0 if earlier. Between
  // hosts, it is as accurate as their clocks.
  virtual const std::vector<int64_t>& wait_ns() const = 0;

  // Runs `f`, a part of the exchange, and returns its result. Reports its exception to the peers.
  template <class F>
  auto run(const F& f) {
    try {
      return f();
    } catch (const std::exception& error) {
      abort(message_of(error));
      throw;
    }
  }
};

}  // namespace ep
