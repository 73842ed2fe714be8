#include "core/in_flight.h"

#include "core/checks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

namespace ep {
namespace {

struct Entry {
  int64_t number;
  std::unique_ptr<Arrival> arrival;
  ArrivalShape shape;
};

using Key = std::pair<std::string, OpKind>;

std::mutex mutex;
int64_t last_number = 0;  // of this process

std::map<Key, std::deque<Entry>>& in_flight() {
  static auto* all = new std::map<Key, std::deque<Entry>>();  // never destroyed: operators may outlive static objects
  return *all;
}

// Numbers of exchanges that were dropped before they were received.
std::vector<int64_t>& dropped() {
  static auto* all = new std::vector<int64_t>();
  return *all;
}

Key key_of(OpKind op, std::string_view group_name) {
  return {std::string(group_name), op};
}

std::string recv_name(OpKind op) {
  return std::string(name_of(op)) + "_recv";
}

std::string numbers_of(const std::deque<Entry>& entries) {
  if (entries.empty()) {
    return "none in flight";
  }
  std::ostringstream out;
  for (const auto& entry : entries) {
    out << (&entry == &entries.front() ? "" : ", ") << entry.number;
  }
  return out.str();
}

// Throws unless `number` is that of the oldest of `entries`.
void check_number(OpKind op, std::string_view group_name, double number, const std::deque<Entry>& entries) {
  if (!entries.empty() && number == static_cast<double>(entries.front().number)) {
    return;
  }
  std::ostringstream message;
  message << recv_name(op) << ": expected the ticket of the oldest exchange in flight of group '" << group_name << "' ("
          << numbers_of(entries) << "), got " << number << ", which ";
  const auto is = [&](int64_t other) { return number == static_cast<double>(other); };
  const auto& lost = dropped();
  if (std::any_of(entries.begin(), entries.end(), [&](const Entry& entry) { return is(entry.number); })) {
    message << "was sent later: receive in the order of the sends";
  } else if (std::any_of(lost.begin(), lost.end(), is)) {
    message << "was in flight when the group was reset or destroyed: send again";
  } else if (number >= 1 && number <= static_cast<double>(last_number) && is(static_cast<int64_t>(number))) {
    message << "was received already, or belongs to another operator or group: pass each ticket to one "
            << recv_name(op);
  } else {
    message << "no send has returned: pass the ticket of a send unchanged";
  }
  TORCH_CHECK_VALUE(false, message.str());
}

void check_shape(OpKind op, const ArrivalShape& expected, const ArrivalShape& got) {
  const auto name = recv_name(op);
  const auto check = [&](const char* what, const auto& sent, const auto& asked) {
    if (sent != asked) {
      std::ostringstream message;
      const auto show = [&](const auto& value) {
        if constexpr (
            std::is_same_v<std::decay_t<decltype(value)>, std::optional<int64_t>> ||
            std::is_same_v<std::decay_t<decltype(value)>, std::optional<at::ScalarType>>) {
          value ? message << *value : message << "None";
        } else {
          message << value;
        }
      };
      message << name << ": expected " << what << " ";
      show(sent);
      message << ", as it was sent, got ";
      show(asked);
      message << ": pass what the send returned and its plan";
      TORCH_CHECK_VALUE(false, message.str());
    }
  };
  check("a result of rows", expected.rows, got.rows);
  check("hidden", expected.hidden, got.hidden);
  check("dtype", expected.dtype, got.dtype);
  check("weights_dtype", expected.weights_dtype, got.weights_dtype);
  check("scales_columns", expected.scales_columns, got.scales_columns);
  check("scales_dtype", expected.scales_dtype, got.scales_dtype);
}

}  // namespace

void check_may_send(OpKind op, std::string_view group_name) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = in_flight().find(key_of(op, group_name));
  TORCH_CHECK(
      found == in_flight().end() || found->second.size() < kMaxInFlight,
      name_of(op),
      "_send: expected at most ",
      kMaxInFlight,
      " exchanges in flight of group '",
      group_name,
      "', got a third beside ",
      numbers_of(found->second),
      ": receive these first, or call torch_ep.reset(group) if their tickets are gone");
}

at::Tensor add_in_flight(
    OpKind op,
    std::string_view group_name,
    std::unique_ptr<Arrival> arrival,
    const ArrivalShape& shape,
    at::Device device) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto ticket = at::full({1}, static_cast<double>(++last_number), at::TensorOptions(at::kDouble).device(device));
  in_flight()[key_of(op, group_name)].push_back({last_number, std::move(arrival), shape});
  return ticket;
}

std::unique_ptr<Arrival>
take_in_flight(OpKind op, std::string_view group_name, const at::Tensor& ticket, const ArrivalShape& shape) {
  std::lock_guard<std::mutex> lock(mutex);
  auto& entries = in_flight()[key_of(op, group_name)];
  if (ticket.is_cpu()) {
    check_number(op, group_name, *ticket.const_data_ptr<double>(), entries);
  }
  TORCH_CHECK_VALUE(
      !entries.empty(), recv_name(op), ": expected an exchange in flight of group '", group_name, "', got none");
  check_shape(op, entries.front().shape, shape);
  auto arrival = std::move(entries.front().arrival);
  entries.pop_front();
  return arrival;
}

void drop_in_flight(const std::string& group_name) {
  std::vector<std::unique_ptr<Arrival>> last;  // destroyed after the lock is released
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto op : {OpKind::dispatch, OpKind::combine}) {
    const auto found = in_flight().find({group_name, op});
    if (found == in_flight().end()) {
      continue;
    }
    for (auto& entry : found->second) {
      last.push_back(std::move(entry.arrival));
      dropped().push_back(entry.number);
    }
    in_flight().erase(found);
  }
}

}  // namespace ep
