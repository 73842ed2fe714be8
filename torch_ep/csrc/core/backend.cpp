#include "core/backend.h"

#include "nvlink/backend.h"
#include "nvlink/layout.h"

#include <map>
#include <mutex>
#include <vector>

namespace ep {
namespace {

struct Entry {
  std::shared_ptr<Backend> backend;
  bool groupless;
};

std::mutex mutex;
std::map<std::string, Entry>& backends() {
  // Never destroyed, as the communicators: the process may exit while kernels run.
  static auto* entries = new std::map<std::string, Entry>();
  return *entries;
}

Entry find(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = backends().find(group_name);
  return found == backends().end() ? Entry{} : found->second;
}

// Removes a backend. What still runs on the device keeps its memory until the process ends.
bool drop(const std::string& group_name) {
  static auto* busy = new std::vector<std::shared_ptr<Backend>>();
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = backends().find(group_name);
  if (found == backends().end()) {
    return true;
  }
  const bool idle = found->second.backend->is_idle();
  if (!idle) {
    busy->push_back(found->second.backend);
  }
  backends().erase(found);
  return idle;
}

std::shared_ptr<Backend> existing(const char* caller, const std::string& group_name) {
  auto backend = find(group_name).backend;
  TORCH_CHECK(backend, caller, ": group '", group_name, "' does not use the nvlink backend");
  return backend;
}

}  // namespace

bool has_backend(const std::string& group_name) {
  return find(group_name).backend != nullptr;
}

std::shared_ptr<Backend>
find_backend(const std::string& group_name, int64_t world_size, const at::Tensor& t, OpKind op) {
  const auto entry = find(group_name);
  if (!entry.backend || !entry.backend->takes(t)) {
    return nullptr;
  }
  if (!entry.groupless) {
    find_communicator(group_name, world_size, op);  // whether it is still the group of `init`
  }
  TORCH_CHECK_VALUE(
      entry.backend->world_size() == world_size,
      name_of(op),
      ": expected world_size ",
      entry.backend->world_size(),
      " (the size of group '",
      group_name,
      "'), got ",
      world_size);
  return entry.backend;
}

bool has_nvlink() {
#ifdef TORCH_EP_CUDA
  return true;
#else
  return false;
#endif
}

bool nvlink_runs() {
#ifdef TORCH_EP_CUDA
  return nvlink::kernels_run();
#else
  return false;
#endif
}

int64_t nvlink_most_experts(int64_t world_size) {
  return nvlink::most_experts(world_size);
}

int64_t nvlink_bytes(int64_t world_size, at::IntArrayRef limits, int64_t num_sms) {
  const auto layout = nvlink::layout_of(world_size, limits, num_sms);
  return layout.bytes() + nvlink::low_latency_layout_of(layout, limits).bytes();
}

bool init_nvlink(const NvlinkOptions& options) {
#ifdef TORCH_EP_CUDA
  auto backend = nvlink::make_nvlink(options);
  const bool was_idle = drop(options.group_name);
  std::lock_guard<std::mutex> lock(mutex);
  backends()[options.group_name] = {std::move(backend), options.groupless};
  return was_idle;
#else
  TORCH_CHECK(false, "torch_ep.init: this build has no nvlink backend");
#endif
}

int64_t settle_nvlink(const std::string& group_name) {
  return existing("torch_ep.reset", group_name)->settle();
}

void restart_nvlink(const std::string& group_name, int64_t epoch) {
  existing("torch_ep.reset", group_name)->restart(epoch);
}

int64_t masked_nvlink(const std::string& group_name) {
  return existing("torch_ep.active_ranks", group_name)->masked();
}

void mask_nvlink(const std::string& group_name, int64_t ranks) {
  existing("torch_ep.mask_ranks", group_name)->mask(ranks);
}

bool destroy_backend(const std::string& group_name) {
  return drop(group_name);
}

}  // namespace ep
