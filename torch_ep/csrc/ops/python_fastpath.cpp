// The Python module torch_ep._C: the registrations of schemas.cpp, and a fast path from the public functions to the
// operators.
//
// Note [Python fast path]. torch.ops checks every argument against the operator's schema, boxes it and unboxes it, and
// Python unpacks and builds plans. This takes longer than the operators' own work on the host, and after an exact plan
// the device waits for it. The fast path takes calls that nothing intercepts before the dispatcher. For other calls it
// returns None, and torch_ep/ops.py takes the slow path. Both paths are identical from the dispatcher on, with its
// modes and profilers. Measured on a CPU, one rank, 4 tokens of 8 elements, torch 2.13, microseconds per call with the
// fast path and without it: plan 11 and 17, dispatch 6 and 21, combine 5 and 20.
//
// has_tangent, for torch_ep/derivatives.py: whether an argument of a call has a forward-mode tangent.
#include "core/backend.h"
#include "ops/ops.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>

namespace {

// The fields of torch_ep.Plan, in its order.
enum PlanField : Py_ssize_t {
  kSendRow,
  kSendCounts,
  kRecvCounts,
  kRecvTopkIdx,
  kRecvPair,
  kOffsets,
  kTokensPerExpert,
  kNumDropped,
  kLayout,
  kGroupName,
  kRail,
  kPlanFields
};

// Torch has one level of dual numbers; torch.func nests levels by wrapping tensors.
bool has_tangent(const at::Tensor& t) {
  return t._fw_grad(/*level=*/0).defined();
}

// Whether a transform of torch.func (jvp, vmap, ...) runs.
bool is_transformed() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The arguments of a call, one after the other.
class Arguments {
 public:
  Arguments(PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected)
      : next_(arguments), needs_slow_path_(at::impl::PythonTorchFunctionTLS::stack_len() > 0 || is_transformed()) {
    TORCH_CHECK_TYPE(count == expected, "torch_ep._C: expected ", expected, " arguments, got ", count);
  }
  // True if a mode, a subclass, autograd or a torch.func transform intercepts the call, or if an argument has another
  // type, which the slow path reports.
  bool needs_slow_path() const { return needs_slow_path_; }

  PyObject* object() { return *next_++; }
  const at::Tensor& tensor() {
    PyObject* argument = object();
    if (!THPVariable_CheckExact(argument)) {
      static const at::Tensor none;
      needs_slow_path_ = true;
      return none;
    }
    const at::Tensor& t = THPVariable_Unpack(argument);
    needs_slow_path_ = needs_slow_path_ || t.requires_grad() || has_tangent(t) || t.layout() != at::kStrided;
    return t;
  }
  std::optional<at::Tensor> optional_tensor() { return is_none() ? std::nullopt : std::optional(tensor()); }
  int64_t integer() {
    PyObject* argument = object();
    int overflow = 1;
    const int64_t value = PyLong_CheckExact(argument) ? PyLong_AsLongLongAndOverflow(argument, &overflow) : 0;
    needs_slow_path_ = needs_slow_path_ || overflow != 0;
    return value;
  }
  std::optional<int64_t> optional_integer() { return is_none() ? std::nullopt : std::optional(integer()); }
  c10::string_view string() {
    PyObject* argument = object();
    Py_ssize_t size = 0;
    const char* text = PyUnicode_Check(argument) ? PyUnicode_AsUTF8AndSize(argument, &size) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
      needs_slow_path_ = true;
      return {};
    }
    return {text, static_cast<size_t>(size)};
  }

 private:
  bool is_none() {
    const bool is = *next_ == Py_None;
    next_ += is;
    return is;
  }

  PyObject* const* next_;
  bool needs_slow_path_;
};

bool is_rank_major(PyObject* layout) {
  return PyUnicode_Check(layout) && PyUnicode_CompareWithASCIIString(layout, "rank_major") == 0;
}

// The tensors of a plan that dispatch and combine use, as separate arguments.
class PlanArguments {
 public:
  PlanArguments(PyObject* type, PyObject* plan) {
    if (!Py_IS_TYPE(plan, reinterpret_cast<PyTypeObject*>(type)) || PyTuple_GET_SIZE(plan) != kPlanFields) {
      return;
    }
    const auto field = [plan](PlanField i) { return PyTuple_GET_ITEM(plan, i); };
    PyObject* recv_map = field(is_rank_major(field(kLayout)) ? kRecvTopkIdx : kRecvPair);
    is_whole_ = recv_map != Py_None && field(kRail) == Py_None;
    fields_ = {field(kSendRow), field(kSendCounts), field(kRecvCounts), recv_map, field(kLayout), field(kGroupName)};
  }
  // False: the slow path raises an error, or exchanges on a grid of nodes.
  bool is_whole() const { return is_whole_; }
  Arguments arguments() const { return {fields_.data(), kCount, kCount}; }

 private:
  static constexpr Py_ssize_t kCount = 6;
  bool is_whole_ = false;
  std::array<PyObject*, kCount> fields_{};
};

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Calls below autograd, since no argument requires a gradient.
template <class Function, class... Args>
auto call(const c10::TypedOperatorHandle<Function>& op, const Args&... args) {
  const WithoutGil without_gil;
  const at::AutoDispatchBelowAutograd below_autograd;
  return op.call(args...);
}

template <class Function>
c10::TypedOperatorHandle<Function> operator_of(const char* name, const char* overload, Function* = nullptr) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Function>();
}

PyObject* wrap(const at::Tensor& t) {
  return THPVariable_Wrap(t);
}

// Rows alone, or a tuple of rows and the other payloads.
PyObject* wrap(const ep::Payloads& payloads) {
  const auto& [rows, weights, scales] = payloads;
  if (!weights && !scales) {
    return wrap(rows);
  }
  PyObject* result = PyTuple_New(1 + weights.has_value() + scales.has_value());
  if (result == nullptr) {
    throw python_error();
  }
  PyTuple_SET_ITEM(result, 0, wrap(rows));
  Py_ssize_t count = 1;
  for (const auto& t : {weights, scales}) {
    if (t) {
      PyTuple_SET_ITEM(result, count++, wrap(*t));
    }
  }
  return result;
}

// An object of the class torch_ep.Plan.
PyObject* wrap_plan(PyTypeObject* type, const ep::PlanResult& plan, PyObject* layout, PyObject* group_name) {
  PyObject* result = type->tp_alloc(type, kPlanFields);
  if (result == nullptr) {
    throw python_error();
  }
  const auto set = [&](PlanField field, PyObject* value) { PyTuple_SET_ITEM(result, field, value); };
  const auto& [send_row, send_counts, recv_counts, recv_map, offsets, tokens_per_expert, num_dropped] = plan;
  const bool rank_major = is_rank_major(layout);
  set(kSendRow, wrap(send_row));
  set(kSendCounts, wrap(send_counts));
  set(kRecvCounts, wrap(recv_counts));
  set(rank_major ? kRecvTopkIdx : kRecvPair, wrap(recv_map));
  set(rank_major ? kRecvPair : kRecvTopkIdx, Py_NewRef(Py_None));
  set(kOffsets, wrap(offsets));
  set(kTokensPerExpert, wrap(tokens_per_expert));
  set(kNumDropped, wrap(num_dropped));
  set(kLayout, Py_NewRef(layout));
  set(kGroupName, Py_NewRef(group_name));
  set(kRail, Py_NewRef(Py_None));
  return result;
}

// The arguments as the operator's schema has them: the capacity is a symbol.
using PlanCapacity = ep::PlanResult(
    const at::Tensor&,
    int64_t,
    c10::string_view,
    int64_t,
    c10::SymInt,
    int64_t,
    c10::string_view,
    std::optional<int64_t>,
    const std::optional<at::Tensor>&);

// (Plan, topk_idx, num_experts, layout, alignment, capacity, world_size, group_name, max_tokens_per_rank, after)
PyObject* plan(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto exact = operator_of("ep::plan", "", &ep::plan);
  static const auto with_capacity = operator_of<PlanCapacity>("ep::plan", "capacity");
  Arguments a(arguments, count, 10);
  auto* type = reinterpret_cast<PyTypeObject*>(a.object());
  const at::Tensor& topk_idx = a.tensor();
  const int64_t num_experts = a.integer();
  const auto layout = a.string();
  const int64_t alignment = a.integer();
  const auto capacity = a.optional_integer();
  const int64_t world_size = a.integer();
  const auto group_name = a.string();
  const auto max_tokens_per_rank = a.optional_integer();
  const auto after = a.optional_tensor();
  if (a.needs_slow_path()) {
    Py_RETURN_NONE;
  }
  const auto planned = [&](const auto& op, const auto&... optional_capacity) {
    return call(
        op,
        topk_idx,
        num_experts,
        layout,
        alignment,
        optional_capacity...,
        world_size,
        group_name,
        max_tokens_per_rank,
        after);
  };
  const auto result = capacity ? planned(with_capacity, c10::SymInt(*capacity)) : planned(exact);
  return wrap_plan(type, result, arguments[3], arguments[7]);
  END_HANDLE_TH_ERRORS
}

// Calls f(arguments of the plan) if nothing intercepts the call.
template <class F>
PyObject* with_plan(const Arguments& a, const PlanArguments& plan, const F& f) {
  if (a.needs_slow_path() || !plan.is_whole()) {
    Py_RETURN_NONE;
  }
  Arguments p = plan.arguments();
  const at::Tensor &send_row = p.tensor(), &send_counts = p.tensor(), &recv_counts = p.tensor();
  const at::Tensor& recv_map = p.tensor();
  const auto layout = p.string(), group_name = p.string();
  if (p.needs_slow_path()) {
    Py_RETURN_NONE;
  }
  return wrap(f(send_row, send_counts, recv_counts, recv_map, layout, group_name));
}

// (rows, Plan, plan, topk_weights, scales, after)
template <ep::Payloads (*function)(
    const at::Tensor&,
    const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&,
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    c10::string_view,
    c10::string_view,
    const std::optional<at::Tensor>&)>
PyObject* exchange(const char* name, PyObject* const* arguments, Py_ssize_t count) {
  static const auto op = operator_of(name, "", function);
  Arguments a(arguments, count, 6);
  const at::Tensor& rows = a.tensor();
  PyObject* type = a.object();
  const PlanArguments plan(type, a.object());
  const auto weights = a.optional_tensor(), scales = a.optional_tensor(), after = a.optional_tensor();
  return with_plan(a, plan, [&](const auto&... p) { return call(op, rows, weights, scales, p..., after); });
}

PyObject* dispatch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return exchange<ep::dispatch>("ep::dispatch", arguments, count);
  END_HANDLE_TH_ERRORS
}

PyObject* combine(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return exchange<ep::combine>("ep::combine", arguments, count);
  END_HANDLE_TH_ERRORS
}

// (rows, Plan, plan, row_weights, after)
PyObject* combine_weighted(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op = operator_of("ep::combine", "weighted", &ep::combine_weighted);
  Arguments a(arguments, count, 5);
  const at::Tensor& rows = a.tensor();
  PyObject* type = a.object();
  const PlanArguments plan(type, a.object());
  const at::Tensor& weights = a.tensor();
  const auto after = a.optional_tensor();
  return with_plan(a, plan, [&](const auto&... p) { return call(op, rows, weights, p..., after); });
  END_HANDLE_TH_ERRORS
}

// Whether one of the arguments is a tensor with a tangent.
PyObject* any_has_tangent(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return PyBool_FromLong(std::any_of(arguments, arguments + count, [](PyObject* argument) {
    return THPVariable_Check(argument) && has_tangent(THPVariable_Unpack(argument));
  }));
  END_HANDLE_TH_ERRORS
}

PyObject* exchanges_begun(PyObject*, PyObject*) {
  return PyLong_FromLongLong(ep::exchanges_begun());
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  const auto method = [](auto* function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)); };
  static PyMethodDef methods[] = {
      {"plan", method(plan), METH_FASTCALL, nullptr},
      {"dispatch", method(dispatch), METH_FASTCALL, nullptr},
      {"combine", method(combine), METH_FASTCALL, nullptr},
      {"combine_weighted", method(combine_weighted), METH_FASTCALL, nullptr},
      {"has_tangent", method(any_has_tangent), METH_FASTCALL, nullptr},
      {"exchanges_begun", exchanges_begun, METH_NOARGS, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
