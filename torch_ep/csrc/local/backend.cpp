// The backend of a group of one rank: permutes and unpermutes, without an exchange. Needs no torch_ep.init.
#include "local/composed_backend.h"

namespace ep {
namespace {

class LocalBackend final : public ComposedBackend {
 public:
  LocalBackend() : ComposedBackend(1, {}) {}

  PlanResult plan(const at::Tensor& topk_idx, const PlanOptions& options) override {
    if (const auto* kernels = one_rank_kernels(topk_idx)) {
      check_num_tokens("ep::plan", topk_idx.size(0), options.max_tokens_per_rank);
      return kernels->plan(
          topk_idx,
          {options.expert_major, options.num_experts, options.alignment, options.capacity, topk_idx.scalar_type()});
    }
    return ComposedBackend::plan(topk_idx, options);
  }

  Payloads dispatch(
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override {
    if (const auto* kernels = one_rank_kernels(x)) {
      return kernels->dispatch(plan, x, topk_weights, scales);
    }
    return ComposedBackend::dispatch(plan, x, topk_weights, scales);
  }

  Payloads combine(
      const PlanTensors& plan,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override {
    if (const auto* kernels = one_rank_kernels(y)) {
      return kernels->combine(plan, y, row_weights, topk_weights, scales);
    }
    return ComposedBackend::combine(plan, y, row_weights, topk_weights, scales);
  }

 protected:
  std::unique_ptr<RowExchange> begin_exchange(
      OpKind /*op*/,
      const std::vector<int64_t>& /*send_rows*/,
      const std::vector<int64_t>& /*recv_rows*/,
      const std::vector<Agreed>& /*agreed*/) override {
    return nullptr;
  }
  void report(OpKind /*op*/, const std::string& /*failure*/) override {}
};

std::shared_ptr<Backend>
find_local(OpKind /*op*/, const std::string& /*group_name*/, int64_t world_size, const at::Tensor& /*t*/) {
  static const auto backend = std::make_shared<LocalBackend>();
  return world_size == 1 ? backend : nullptr;
}

bool report_to_nobody(OpKind /*op*/, const std::string& /*group_name*/, const std::string& /*failure*/) {
  return false;
}

const BackendRegistration registration(
    {.name = "local", .order = 1, .find = find_local, .report_failure = report_to_nobody});

}  // namespace
}  // namespace ep
