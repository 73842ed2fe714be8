#include "core/backend.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace ep {
namespace {

// Filled while the library is loaded, read-only afterwards.
std::vector<BackendKind>& kinds() {
  static auto* all = new std::vector<BackendKind>();
  return *all;
}

}  // namespace

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

void report_failure(OpKind op, std::string_view group_name, const std::string& failure) {
  const std::string group(group_name);
  for (const auto& kind : kinds()) {
    if (kind.report_failure(op, group, failure)) {
      return;
    }
  }
}

int64_t& exchanges_begun() {
  thread_local int64_t count = 0;
  return count;
}

}  // namespace ep
