// Exchanges in flight: begun by a _send operator, ended by the matching _recv operator.
#pragma once

#include "core/types.h"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace ep {

// Note [In flight]
// dispatch_send and combine_send return a ticket: a float64 tensor with the number of an exchange in flight. The rows
// stay with the backend, since their number is not known to a compiler. The ticket is floating so that autograd carries
// it: the gradient of the ticket of a dispatch is the ticket of a combine. Adding zeros to a ticket leaves it as it is.
//
// A group has at most kMaxInFlight exchanges of each kind in flight, which are received in the order of their sends.
// A ticket on another device than the CPU is not read, which would wait for the device: there the oldest exchange is
// received.
constexpr size_t kMaxInFlight = 2;

// What the result of a _recv looks like: a compiler knows it from the arguments, before the exchange.
struct ArrivalShape {
  int64_t rows, hidden;
  at::ScalarType dtype;
  std::optional<at::ScalarType> weights_dtype;
  std::optional<int64_t> scales_columns;
  std::optional<at::ScalarType> scales_dtype;
};

// The second half of an exchange, as a backend implements it. If it is destroyed before it is received, its group
// cannot be used before torch_ep.reset or torch_ep.init.
class Arrival {
 public:
  virtual ~Arrival() = default;
  // Waits for the rows. Called once.
  virtual Payloads receive() = 0;
};

// Results that have arrived already.
class ArrivedPayloads final : public Arrival {
 public:
  explicit ArrivedPayloads(Payloads payloads) : payloads_(std::move(payloads)) {}
  Payloads receive() override { return std::move(payloads_); }

 private:
  Payloads payloads_;
};

// Throws if no further exchange of this kind may be in flight.
void check_may_send(OpKind op, std::string_view group_name);
// Returns the ticket.
at::Tensor add_in_flight(
    OpKind op,
    std::string_view group_name,
    std::unique_ptr<Arrival> arrival,
    const ArrivalShape& shape,
    at::Device device);
// Removes the exchange of this ticket. Throws if it is not the oldest of its kind in flight, or if its results will not
// have this shape; then it stays in flight.
std::unique_ptr<Arrival>
take_in_flight(OpKind op, std::string_view group_name, const at::Tensor& ticket, const ArrivalShape& shape);
// Destroys the exchanges in flight of a group.
void drop_in_flight(const std::string& group_name);

}  // namespace ep
