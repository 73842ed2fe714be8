// Every schema of torch_ep. Importing the extension is what registers them. The fakes are in torch_ep/meta.py, the
// autograd formulas in torch_ep/ops.py.
#include "ops.h"

#include "comm/transport.h"
#include "local.h"

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/library.h>

namespace {

void init(std::string group_name, int64_t timeout_ms, at::IntArrayRef limits, at::IntArrayRef choice) {
  ep::init_communicator(group_name, timeout_ms, limits, choice);
}

void destroy(std::string group_name) {
  ep::destroy_communicator(group_name);
}

bool destroy_nvlink(std::string group_name) {
  return ep::destroy_transport(group_name);
}

bool init_nvlink(
    std::string group_name,
    int64_t rank,
    int64_t world_size,
    at::IntArrayRef buffers,
    at::IntArrayRef limits,
    int64_t num_sms,
    int64_t timeout_ms,
    bool groupless) {
  return ep::init_nvlink({group_name, rank, world_size, buffers, limits, num_sms, timeout_ms, groupless});
}

int64_t settle_nvlink(std::string group_name) {
  return ep::settle_nvlink(group_name);
}

void restart_nvlink(std::string group_name, int64_t epoch) {
  ep::restart_nvlink(group_name, epoch);
}

void force_aten(bool on) {
  ep::force_aten = on;
}

}  // namespace

TORCH_LIBRARY(ep, m) {
  m.set_python_module("torch_ep.meta");

  // Exact: as many rows as arrive. The one exchange that waits for the device, so CUDA graphs are cut here.
  m.def(
      "plan(Tensor topk_idx, int num_experts, str layout, int alignment, int world_size, str group_name, "
      "int? max_tokens_per_rank=None, Tensor? after=None) -> (Tensor send_slot, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, Tensor offsets, Tensor tokens_per_expert, Tensor num_dropped)",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});
  m.def(
      "plan.capacity(Tensor topk_idx, int num_experts, str layout, int alignment, SymInt capacity, int world_size, "
      "str group_name, int? max_tokens_per_rank=None, Tensor? after=None) -> (Tensor send_slot, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, Tensor offsets, Tensor tokens_per_expert, Tensor num_dropped)",
      {at::Tag::pt2_compliant_tag});

  // Each is the other's transpose, payload by payload: rows, numbers per (token, slot), and scales that go with rows.
  m.def(
      "dispatch(Tensor x, Tensor? topk_weights, Tensor? scales, Tensor send_slot, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, str layout, str group_name, Tensor? after=None) "
      "-> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine(Tensor y, Tensor? topk_weights, Tensor? scales, Tensor send_slot, Tensor send_counts, "
      "Tensor recv_counts, Tensor recv_map, str layout, str group_name, Tensor? after=None) "
      "-> (Tensor, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "combine.weighted(Tensor y, Tensor row_weights, Tensor send_slot, Tensor send_counts, Tensor recv_counts, "
      "Tensor recv_map, str layout, str group_name, Tensor? after=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});

  // A zero of shape [] that exists only once `dep` does: how a backward keeps the order that `after` set forward.
  m.def("zero_after(Tensor dep) -> Tensor", {at::Tag::pt2_compliant_tag});

  // a[rows of group i] @ b[i], zero past the last group; and the transpose in b: a[rows of group i]^T @ g[the same].
  m.def(
      "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});  // reads the offsets on the host
  m.def(
      "grouped_mm.transpose(Tensor a, Tensor g, Tensor offsets) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});

  // Collective and local halves of torch_ep.init and torch_ep.destroy.
  m.def("_init(str group_name, int timeout_ms, int[] limits, int[] choice) -> ()", &init);
  m.def("_destroy(str group_name) -> ()", &destroy);
  m.def("_has_nvlink() -> bool", &ep::has_nvlink);
  m.def("_nvlink_runs() -> bool", &ep::nvlink_runs);
  m.def("_nvlink_bytes(int world_size, int[] limits, int num_sms) -> int", &ep::nvlink_bytes);
  m.def(
      "_init_nvlink(str group_name, int rank, int world_size, int[] buffers, int[] limits, int num_sms, "
      "int timeout_ms, bool groupless) -> bool",  // of the transport that it replaces: as _destroy_nvlink
      &init_nvlink);
  m.def("_destroy_nvlink(str group_name) -> bool", &destroy_nvlink);  // false: it still runs, its buffers have to stay
  m.def("_settle_nvlink(str group_name) -> int", &settle_nvlink);
  m.def("_restart_nvlink(str group_name, int epoch) -> ()", &restart_nvlink);
  m.def("_force_aten(bool on) -> ()", &force_aten);
}

namespace {

void implement(torch::Library& m) {
  m.impl("plan", &ep::plan);
  m.impl("plan.capacity", &ep::plan_capacity);
  m.impl("dispatch", &ep::dispatch);
  m.impl("combine", &ep::combine);
  m.impl("combine.weighted", &ep::combine_weighted);
  m.impl("zero_after", &ep::zero_after);
  m.impl("grouped_mm", &ep::grouped_mm);
  m.impl("grouped_mm.transpose", &ep::grouped_mm_transpose);
}

}  // namespace

TORCH_LIBRARY_IMPL(ep, CPU, m) {
  implement(m);
}

TORCH_LIBRARY_IMPL(ep, CUDA, m) {
  implement(m);
}

// Lets Python import this library like a module; there is nothing in it but the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
