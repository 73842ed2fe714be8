#include "core/backend.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>

namespace ep {
namespace {

// Filled while the library is loaded, read-only afterwards.
std::vector<BackendKind>& kinds() {
  static auto* all = new std::vector<BackendKind>();
  return *all;
}

struct Link {
  std::string other;
  bool is_node;
};

std::mutex links_mutex;
std::map<std::string, Link>& links() {
  static auto* all = new std::map<std::string, Link>();  // never destroyed: operators may outlive static objects
  return *all;
}

std::optional<Link> link_of(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(links_mutex);
  const auto found = links().find(group_name);
  return found == links().end() ? std::nullopt : std::optional(found->second);
}

void unlink(const std::string& group_name) {
  const auto found = links().find(group_name);
  if (found != links().end()) {
    links().erase(found->second.other);
    links().erase(group_name);
  }
}

void report_to_group(OpKind op, const std::string& group, const std::string& failure) {
  for (const auto& kind : kinds()) {
    if (kind.report_failure(op, group, failure)) {
      return;
    }
  }
}

}  // namespace

std::unique_ptr<Arrival> Backend::dispatch_send(
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  return std::make_unique<ArrivedPayloads>(dispatch(plan, x, topk_weights, scales));
}

std::unique_ptr<Arrival> Backend::combine_send(
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  return std::make_unique<ArrivedPayloads>(combine(plan, y, row_weights, topk_weights, scales));
}

Payloads Backend::dispatch_on_grid(
    const GridLevel& rail,
    const GridLevel& node,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  constexpr auto op = OpKind::dispatch;
  const auto [rows, weights, row_scales] =
      linked(op, rail.group_name, [&] { return rail.backend.dispatch(rail.plan, x, topk_weights, scales); });
  return linked(op, node.group_name, [&, &rows = rows, &weights = weights, &row_scales = row_scales] {
    return node.backend.dispatch(node.plan, rows, weights, row_scales);
  });
}

Payloads Backend::combine_on_grid(
    const GridLevel& rail,
    const GridLevel& node,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  constexpr auto op = OpKind::combine;
  const auto [sums, weights, row_scales] = linked(
      op, node.group_name, [&] { return node.backend.combine(node.plan, y, row_weights, topk_weights, scales); });
  return linked(op, rail.group_name, [&, &sums = sums, &weights = weights, &row_scales = row_scales] {
    return rail.backend.combine(rail.plan, sums, std::nullopt, weights, row_scales);
  });
}

BackendRegistration::BackendRegistration(const BackendKind& kind) {
  auto& all = kinds();
  const auto later = [&](const BackendKind& other) { return other.order > kind.order; };
  all.insert(std::find_if(all.begin(), all.end(), later), kind);
}

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const auto& kind : kinds()) {
    names.emplace_back(kind.name);
  }
  return names;
}

std::shared_ptr<Backend> find_backend(OpKind op, std::string_view group_name, int64_t world_size, const at::Tensor& t) {
  const std::string group(group_name);
  for (const auto& kind : kinds()) {
    if (auto backend = kind.find(op, group, world_size, t)) {
      return backend;
    }
  }
  TORCH_CHECK(false, name_of(op), ": no backend runs group '", group, "' on ", t.device());
}

void check_group(OpKind op, const std::string& group_name, int64_t world_size) {
  for (const auto& kind : kinds()) {
    if (kind.check_group != nullptr) {
      kind.check_group(op, group_name, world_size);
    }
  }
}

void link_groups(const std::string& rail, const std::string& node) {
  std::lock_guard<std::mutex> lock(links_mutex);
  unlink(rail);
  unlink(node);
  links()[rail] = {node, false};
  links()[node] = {rail, true};
}

void unlink_group(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(links_mutex);
  unlink(group_name);
}

bool is_linked(const std::string& group_name) {
  return link_of(group_name).has_value();
}

bool is_second_exchange(OpKind op, const std::string& group_name) {
  const auto link = link_of(group_name);
  const bool is_combine = op == OpKind::combine || op == OpKind::low_latency_combine;
  return op != OpKind::init && link && link->is_node != is_combine;
}

void report_to_linked_group(OpKind op, std::string_view group_name, const std::string& failure) {
  if (const auto link = link_of(std::string(group_name))) {
    report_to_group(op, link->other, failure);
  }
}

void report_failure(OpKind op, std::string_view group_name, const std::string& failure) {
  report_to_group(op, std::string(group_name), failure);
  report_to_linked_group(op, group_name, failure);
}

int64_t& exchanges_begun() {
  thread_local int64_t count = 0;
  return count;
}

}  // namespace ep
