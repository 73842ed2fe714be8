#include "core/types.h"

#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>

namespace ep {

const char* name_of(OpKind op) {
  switch (op) {
    case OpKind::init:
      return "torch_ep.init";
    case OpKind::plan:
      return "ep::plan";
    case OpKind::dispatch:
      return "ep::dispatch";
    case OpKind::combine:
      return "ep::combine";
    case OpKind::low_latency_dispatch:
      return "ep::low_latency_dispatch";
    case OpKind::low_latency_combine:
      return "ep::low_latency_combine";
  }
  return "an unknown op";
}

OpKind kind_of(const std::string& name) {
  for (const auto op : {OpKind::init, OpKind::plan, OpKind::dispatch, OpKind::combine, OpKind::low_latency_dispatch}) {
    if (name == name_of(op)) {
      return op;
    }
  }
  TORCH_CHECK(name == name_of(OpKind::low_latency_combine), "torch_ep: expected the name of an operator, got ", name);
  return OpKind::low_latency_combine;
}

std::string message_of(const std::exception& error) {
  if (const auto* torch_error = dynamic_cast<const c10::Error*>(&error)) {
    return torch_error->what_without_backtrace();
  }
  if (dynamic_cast<const python_error*>(&error) != nullptr) {
    return "interrupted by a signal, such as Ctrl-C";
  }
  return error.what();
}

}  // namespace ep
