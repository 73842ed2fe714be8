// What Python imports as torch_ep._C: the registrations of ops.cpp, and a short way to the operators that a host calls
// between two kernels. torch.ops looks at every argument by the operator's schema, boxes it and unboxes it again, which
// takes longer than all that the operator itself does on the host; after an exact plan a device waits for that. From
// here on both ways are one: the dispatcher, with its modes, subclasses and profilers.
#include "ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace {

// The arguments of a call, one after the other.
class Arguments {
 public:
  Arguments(const char* op, PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected)
      : op_(op), next_(arguments) {
    TORCH_CHECK_TYPE(count == expected, op_, ": expected ", expected, " arguments, got ", count);
  }
  const at::Tensor& tensor() {
    PyObject* argument = *next_++;
    TORCH_CHECK_TYPE(THPVariable_Check(argument), op_, ": expected a Tensor, got ", Py_TYPE(argument)->tp_name);
    return THPVariable_Unpack(argument);
  }
  std::optional<at::Tensor> optional_tensor() {
    if (*next_ == Py_None) {
      ++next_;
      return std::nullopt;
    }
    return tensor();
  }
  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(*next_++);
    if (value == -1 && PyErr_Occurred() != nullptr) {
      throw python_error();
    }
    return value;
  }
  std::optional<int64_t> optional_integer() {
    if (*next_ == Py_None) {
      ++next_;
      return std::nullopt;
    }
    return integer();
  }
  c10::string_view string() {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(*next_++, &size);
    if (text == nullptr) {
      throw python_error();
    }
    return {text, static_cast<size_t>(size)};
  }

 private:
  const char* op_;
  PyObject* const* next_;
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

// Past autograd: of tensors of which none requires a gradient.
template <class Function, class... Args>
auto call(const c10::TypedOperatorHandle<Function>& op, const Args&... args) {
  const WithoutGil without_gil;
  const at::AutoDispatchBelowAutograd below_autograd;
  return op.call(args...);
}

template <class Function>
c10::TypedOperatorHandle<Function> operator_of(const char* name, const char* overload, Function*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Function>();
}

PyObject* wrap(const at::Tensor& t) {
  return THPVariable_Wrap(t);
}

PyObject* wrap(const std::optional<at::Tensor>& t) {
  if (t) {
    return THPVariable_Wrap(*t);
  }
  Py_RETURN_NONE;
}

template <class... Tensors>
PyObject* wrap(const std::tuple<Tensors...>& tensors) {
  PyObject* result = PyTuple_New(sizeof...(Tensors));
  if (result == nullptr) {
    throw python_error();
  }
  Py_ssize_t i = 0;
  std::apply([&](const auto&... t) { (PyTuple_SET_ITEM(result, i++, wrap(t)), ...); }, tensors);
  return result;
}

PyObject* plan(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op = operator_of("ep::plan", "", &ep::plan);
  Arguments a("ep::plan", arguments, count, 8);
  const at::Tensor& topk_idx = a.tensor();
  const int64_t num_experts = a.integer();
  const auto layout = a.string();
  const int64_t alignment = a.integer(), world_size = a.integer();
  const auto group_name = a.string();
  const auto max_tokens_per_rank = a.optional_integer();
  const auto after = a.optional_tensor();
  return wrap(call(op, topk_idx, num_experts, layout, alignment, world_size, group_name, max_tokens_per_rank, after));
  END_HANDLE_TH_ERRORS
}

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
  Arguments a(name, arguments, count, 10);
  const at::Tensor& rows = a.tensor();
  const auto weights = a.optional_tensor(), scales = a.optional_tensor();
  const at::Tensor &send_slot = a.tensor(), &send_counts = a.tensor(), &recv_counts = a.tensor();
  const at::Tensor& recv_map = a.tensor();
  const auto layout = a.string(), group_name = a.string();
  const auto after = a.optional_tensor();
  return wrap(
      call(op, rows, weights, scales, send_slot, send_counts, recv_counts, recv_map, layout, group_name, after));
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

PyObject* combine_weighted(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op = operator_of("ep::combine", "weighted", &ep::combine_weighted);
  Arguments a("ep::combine", arguments, count, 9);
  const at::Tensor &rows = a.tensor(), &weights = a.tensor();
  const at::Tensor &send_slot = a.tensor(), &send_counts = a.tensor(), &recv_counts = a.tensor();
  const at::Tensor& recv_map = a.tensor();
  const auto layout = a.string(), group_name = a.string();
  const auto after = a.optional_tensor();
  return wrap(call(op, rows, weights, send_slot, send_counts, recv_counts, recv_map, layout, group_name, after));
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  const auto method = [](auto* function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)); };
  static PyMethodDef methods[] = {
      {"plan", method(plan), METH_FASTCALL, nullptr},
      {"dispatch", method(dispatch), METH_FASTCALL, nullptr},
      {"combine", method(combine), METH_FASTCALL, nullptr},
      {"combine_weighted", method(combine_weighted), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
