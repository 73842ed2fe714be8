// How wire rows reach the other ranks, for backends that are composed of local kernels and an exchange.
#pragma once

#include "core/types.h"

#include <memory>
#include <vector>

namespace ep {

// A number on which all ranks of an exchange must agree, with the name that an error calls it by.
struct Agreed {
  const char* name;
  int64_t value;
  bool is_dtype = false;  // the value is an at::ScalarType
};

// One exchange of wire rows. It has begun when the object exists.
class RowExchange {
 public:
  virtual ~RowExchange() = default;

  // Waits until all ranks agree on this exchange. Returns the rows that each rank will send here.
  virtual std::vector<int64_t> confirm() = 0;
  // Starts to move rows [n, width]: `sent` holds those for rank 0 first. Both contiguous, of one width and dtype.
  virtual void start(const at::Tensor& received, const at::Tensor& sent, const std::vector<int64_t>& recv_rows) = 0;
  // Waits for everything started. The exchange ends here.
  virtual void finish() = 0;
  // Aborts an exchange that this rank cannot finish, and reports the reason to the peers.
  virtual void abandon(const std::string& why) = 0;
  // After `confirm`: how much later than this rank each rank came, in ns; 0 for the earlier ones. Between hosts it is
  // as exact as their clocks.
  virtual const std::vector<int64_t>& wait_ns() const = 0;

  // Runs `f`, a part of the exchange, and returns its result. Reports its exception to the peers.
  template <class F>
  auto run(const F& f) {
    try {
      return f();
    } catch (const std::exception& error) {
      abandon(message_of(error));
      throw;
    }
  }
};

}  // namespace ep
