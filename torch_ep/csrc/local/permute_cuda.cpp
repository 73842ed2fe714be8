// The permute kernels on CUDA: converts tensors to the arguments of permute_kernels.h and launches.
#include "local/permute.h"

#include "core/cuda_stream.h"
#include "core/cuda_tensors.h"
#include "core/integer_tensors.h"
#include "local/permute_kernels.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <thread>

namespace ep {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
// Bound of the number of pairs: the index after a thread's last one still fits an int32.
constexpr int64_t kMaxPairs = kMaxInt - 64 * 1024;

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

std::string describe(const PermuteReport& report) {
  std::ostringstream message;
  if (report.kind == PermuteReport::bad_plan) {
    message << (report.is_combine != 0 ? "ep::combine" : "ep::dispatch") << ": expected "
            << (report.tensor == PermuteReport::send_row ? "send_row" : "recv_pair") << " of this plan in [-1, "
            << report.bound << "), got " << report.value;
  } else if (report.earlier_slot < 0) {
    message << "ep::plan: expected topk_idx in [-1, " << report.bound << "), got " << report.value << " at token "
            << report.token << ", slot " << report.slot;
  } else {
    message << "ep::plan: expected different experts in one token, got expert " << report.value << " at token "
            << report.token << ", slots " << report.earlier_slot << " and " << report.slot;
  }
  return message.str();
}

// Memory that the kernels of one device share with the host. Never destroyed: the process may exit while kernels run.
class Device {
 public:
  static Device& of(const at::Tensor& t) {
    static auto* devices = new std::map<c10::DeviceIndex, std::unique_ptr<Device>>();
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    auto& device = (*devices)[t.get_device()];
    if (device == nullptr) {
      const c10::cuda::CUDAGuard guard(t.device());
      // The first call may happen during a capture.
      const c10::cuda::CUDAStreamCaptureModeGuard may_allocate(cudaStreamCaptureModeRelaxed);
      device = std::make_unique<Device>();
    }
    return *device;
  }

  Device() : runs_(prepare_permute_plan() == cudaSuccess) {
    if (!runs_) {
      static_cast<void>(cudaGetLastError());
      return;
    }
    reporter_.report = allocate_on_host<PermuteReport>();
    C10_CUDA_CHECK(cudaMalloc(&reporter_.claimed, sizeof(unsigned)));
    const unsigned zero = 0;
    Stream().copy(reporter_.claimed, &zero, sizeof(zero));
  }

  bool runs() const { return runs_; }
  const Reporter& reporter() const { return reporter_; }

  // Throws the failure that a kernel reported since the last call.
  void throw_reported() {
    std::atomic_ref<int64_t> kind(reporter_.report->kind);
    if (kind.load(std::memory_order_acquire) == PermuteReport::none || is_capturing()) {
      return;
    }
    const std::lock_guard lock(mutex_);
    const PermuteReport report = *reporter_.report;
    if (report.kind != PermuteReport::none) {
      kind.store(PermuteReport::none, std::memory_order_release);
      C10_CUDA_CHECK(
          cudaMemsetAsync(reporter_.claimed, 0, sizeof(unsigned), c10::cuda::getCurrentCUDAStream().stream()));
      TORCH_CHECK_VALUE(false, describe(report));
    }
  }

  // One word per waiting plan.
  PlanReply* take_reply() {
    const std::lock_guard lock(mutex_);
    if (replies_.empty()) {
      return allocate_on_host<PlanReply>();
    }
    auto* reply = replies_.back();
    replies_.pop_back();
    return reply;
  }
  void give_back(PlanReply* reply) {
    const std::lock_guard lock(mutex_);
    replies_.push_back(reply);
  }

 private:
  template <class T>
  static T* allocate_on_host() {
    void* memory = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&memory, sizeof(T), cudaHostAllocPortable | cudaHostAllocMapped));
    return new (memory) T{};
  }

  const bool runs_;
  Reporter reporter_{};
  std::mutex mutex_;
  std::vector<PlanReply*> replies_;
};

// The word in which the kernel of an exact plan returns the number of rows to the host.
class Reply {
 public:
  explicit Reply(Device& device) : device_(device), word_(device.take_reply()) { *word_ = 0; }
  Reply(const Reply&) = delete;
  Reply& operator=(const Reply&) = delete;
  // A kernel that has not answered may still write the word, so the word is not used again.
  ~Reply() {
    if (*word_ != 0) {
      device_.give_back(word_);
    }
  }

  PlanReply* word() const { return word_; }

  // Returns the number of rows; nullopt if an index is bad.
  std::optional<int64_t> await(const char* op, cudaStream_t stream) const {
    using std::chrono::steady_clock;
    // Detects a kernel that never begins, or ends without an answer.
    constexpr auto kQueryEvery = std::chrono::milliseconds(10);
    auto next_query = steady_clock::now() + kQueryEvery;
    std::atomic_ref<PlanReply> word(*word_);
    PlanReply reply = 0;
    while ((reply = word.load(std::memory_order_acquire)) == 0) {
      if (steady_clock::now() < next_query) {
        continue;
      }
      next_query += kQueryEvery;
      const auto status = cudaStreamQuery(stream);
      if (status != cudaErrorNotReady) {
        C10_CUDA_CHECK(status);
        TORCH_CHECK(word.load(std::memory_order_acquire) != 0, op, ": the kernel ended without a result");
      }
      std::this_thread::yield();
    }
    if ((reply & kPlanBad) != 0) {
      return std::nullopt;
    }
    return static_cast<int64_t>(reply & ~kPlanReady);
  }

 private:
  Device& device_;
  PlanReply* word_;
};

// Sets the number of rows of a tensor that has no other owner yet.
void set_rows(const at::Tensor& t, int64_t rows) {
  auto sizes = t.sizes().vec();
  sizes[0] = rows;
  t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
}

// --- plans ---

PermutePlanArgs
plan_args(const Device& device, const at::Tensor& topk_idx, int64_t num_experts, const RecvPlanOptions& options) {
  PermutePlanArgs args{};
  args.topk_idx = topk_idx.const_data_ptr();
  args.wide_idx = topk_idx.scalar_type() == at::kLong;
  args.expert_major = options.expert_major;
  args.num_tokens = static_cast<int>(std::min(topk_idx.size(0), kMaxInt));
  args.num_topk = static_cast<int>(std::min(topk_idx.size(1), kMaxInt));
  args.num_experts = static_cast<int>(std::min(num_experts, kMaxInt - 1));
  args.num_local_experts = static_cast<int>(std::min(options.num_local_experts, kMaxInt - 1));
  args.alignment = static_cast<int>(std::min(options.alignment, kMaxInt));
  args.capacity = options.capacity.value_or(-1);
  args.reporter = device.reporter();
  return args;
}

// Upper bound of the rows of the result, padding included.
int64_t max_rows(const PermutePlanArgs& args) {
  const int64_t slots = std::min(args.num_topk, args.num_experts), pairs = args.num_tokens * slots;
  return args.expert_major ? pairs + std::min<int64_t>(args.num_experts, pairs) * (args.alignment - 1)
                           : args.num_tokens;
}

// Whether the kernels support these sizes: their indices are int32, their shared memory is limited.
bool fits(const PermutePlanArgs& args) {
  return int64_t{args.num_tokens} * args.num_topk <= kMaxPairs && max_rows(args) + args.alignment <= kMaxPairs &&
         permute_plan_scratch(args) > 0;
}

// Allocates scratch and launches. Returns the number of rows; nullopt if the host does not wait for it.
std::optional<int64_t> run_plan(
    const char* op,
    Device& device,
    PermutePlanArgs args,
    const at::Tensor& topk_idx,
    int64_t num_experts,
    bool waits) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto scratch = empty({permute_plan_scratch(args)}, topk_idx, at::kInt);
  args.scratch = mutable_data<int32_t>(scratch);
  if (!waits) {
    C10_CUDA_CHECK(launch_permute_plan(args, stream));
    return std::nullopt;
  }
  const Reply reply(device);
  args.reply = reply.word();
  C10_CUDA_CHECK(launch_permute_plan(args, stream));
  const auto rows = reply.await(op, stream);
  if (!rows) {
    // The CPU's check finds the first bad index and throws the error.
    cpu_kernels.plan_send(op, topk_idx.cpu(), num_experts, 1);
  }
  TORCH_CHECK(rows, op, ": the kernel found a bad index where the host finds none");
  return rows;
}

SendPlan plan_send(const char* op, const at::Tensor& topk_idx, int64_t num_experts, int64_t world_size) {
  const c10::cuda::CUDAGuard guard(topk_idx.device());
  auto& device = Device::of(topk_idx);
  RecvPlanOptions options{};
  options.num_local_experts = num_experts / world_size;
  options.alignment = 1;
  auto args = plan_args(device, topk_idx, num_experts, options);
  args.route = true;
  if (!fits(args) || args.num_tokens * std::min(topk_idx.size(1), world_size) > kMaxPairs / topk_idx.size(1)) {
    return aten_kernels.plan_send(op, topk_idx, num_experts, world_size);
  }
  const int64_t num_tokens = topk_idx.size(0), num_topk = topk_idx.size(1);
  const SendPlan result{
      empty({num_tokens, num_topk}, topk_idx, at::kInt),
      empty({world_size}, topk_idx, at::kInt),
      empty({num_tokens * std::min(num_topk, world_size), num_topk}, topk_idx, at::kInt)};
  args.send_row = mutable_data<int32_t>(result.send_row);
  args.send_counts = mutable_data<int32_t>(result.send_counts);
  args.wire_topk = mutable_data<int32_t>(result.wire_topk);
  set_rows(result.wire_topk, *run_plan(op, device, args, topk_idx, num_experts, true));
  return result;
}

// Allocates the results of a plan: the upper bound of its rows, if it is exact.
RecvPlan make_recv_plan(PermutePlanArgs& args, const at::Tensor& topk_idx) {
  const int64_t rows = args.capacity < 0 ? max_rows(args) : args.capacity;
  RecvPlan plan;
  plan.recv_map = args.expert_major ? empty({rows}, topk_idx, at::kInt) : empty({rows, args.num_topk}, topk_idx);
  plan.offsets = empty({args.expert_major ? args.num_experts : 1}, topk_idx, at::kInt);
  plan.tokens_per_expert = empty({args.num_experts}, topk_idx, at::kInt);
  plan.num_dropped = empty({}, topk_idx, at::kInt);
  args.recv_map = plan.recv_map.mutable_data_ptr();
  args.offsets = mutable_data<int32_t>(plan.offsets);
  args.tokens_per_expert = mutable_data<int32_t>(plan.tokens_per_expert);
  args.num_dropped = mutable_data<int32_t>(plan.num_dropped);
  return plan;
}

RecvPlan plan_recv(const at::Tensor& wire_topk, const std::vector<int64_t>& recv_rows, const RecvPlanOptions& options) {
  constexpr const char* kOp = "ep::plan";
  const c10::cuda::CUDAGuard guard(wire_topk.device());
  auto& device = Device::of(wire_topk);
  auto args = plan_args(device, wire_topk, options.num_local_experts, options);
  if (!fits(args)) {
    return aten_kernels.plan_recv(wire_topk, recv_rows, options);
  }
  if (!options.expert_major && !options.capacity) {
    args.capacity = wire_topk.size(0);
  }
  auto plan = make_recv_plan(args, wire_topk);
  const bool waits = args.capacity < 0;
  const auto rows = run_plan(kOp, device, args, wire_topk, options.num_local_experts, waits);
  if (waits) {
    set_rows(plan.recv_map, *rows);
  }
  if (!options.expert_major) {
    plan.recv_map = plan.recv_map.to(options.index_dtype);
    auto ends = recv_rows;
    for (size_t rank = 0; rank < ends.size(); ++rank) {
      ends[rank] += rank == 0 ? 0 : ends[rank - 1];
    }
    plan.offsets = to_device(ends, wire_topk).clamp_max(args.capacity).to(at::kInt);
  }
  return plan;
}

PlanResult plan(const at::Tensor& topk_idx, const RecvPlanOptions& options) {
  constexpr const char* kOp = "ep::plan";
  const c10::cuda::CUDAGuard guard(topk_idx.device());
  auto& device = Device::of(topk_idx);
  device.throw_reported();
  TORCH_CHECK(
      options.capacity || !is_capturing(),
      kOp,
      ": expected a capacity while a CUDA graph is captured: an exact plan waits for the number of rows");
  const int64_t num_experts = options.num_local_experts;
  auto args = plan_args(device, topk_idx, num_experts, options);
  if (!fits(args)) {
    const auto routed = aten_kernels.plan_send(kOp, topk_idx, num_experts, 1);
    const auto placed = aten_kernels.plan_recv(routed.wire_topk, {routed.wire_topk.size(0)}, options);
    return {
        routed.send_row,
        routed.send_counts,
        routed.send_counts.clone(),
        placed.recv_map,
        placed.offsets,
        placed.tokens_per_expert,
        placed.num_dropped};
  }
  const auto send_row = empty(topk_idx.sizes(), topk_idx, at::kInt);
  const auto send_counts = empty({1}, topk_idx, at::kInt), recv_counts = empty({1}, topk_idx, at::kInt);
  args.send_row = mutable_data<int32_t>(send_row);
  args.send_counts = mutable_data<int32_t>(send_counts);
  args.recv_counts = mutable_data<int32_t>(recv_counts);
  const auto plan = make_recv_plan(args, topk_idx);
  if (const auto rows = run_plan(kOp, device, args, topk_idx, num_experts, !options.capacity)) {
    set_rows(plan.recv_map, *rows);
  }
  return {send_row, send_counts, recv_counts, plan.recv_map, plan.offsets, plan.tokens_per_expert, plan.num_dropped};
}

// --- rows ---

// A RowMap and its device memory, which has to live until the kernels are launched.
struct Map {
  RowMap map;
  at::Tensor row_of;
};

// `wire_rows`: upper bound.
Map make_map(
    bool is_combine,
    const at::Tensor* send_row,
    const at::Tensor* recv_pair,
    int64_t wire_rows,
    int64_t rows,
    int64_t num_topk,
    const PlanTensors* plan = nullptr) {
  const at::Tensor& of = send_row != nullptr ? *send_row : *recv_pair;
  Map result{};
  RowMap& map = result.map;
  map.items = static_cast<int>(send_row != nullptr ? send_row->size(0) : wire_rows);
  map.wire_rows = static_cast<int>(wire_rows);
  map.rows = static_cast<int>(rows);
  map.num_topk = static_cast<int>(num_topk);
  map.reporter = Device::of(of).reporter();
  map.is_combine = is_combine;
  if (plan != nullptr) {
    map.send_count = data<int32_t>(plan->send_counts);
    map.recv_count = data<int32_t>(plan->recv_counts);
  }
  if (send_row != nullptr) {
    map.send_row = data<int32_t>(*send_row);
  }
  if (recv_pair != nullptr) {
    map.recv_pair = data<int32_t>(*recv_pair);
    result.row_of = empty({wire_rows * num_topk}, of, at::kInt);
    map.row_of = mutable_data<int32_t>(result.row_of);
    C10_CUDA_CHECK(launch_invert_recv_pair(map, c10::cuda::getCurrentCUDAStream()));
  }
  return result;
}

Map make_map(bool is_combine, const PlanTensors& plan) {
  const auto& send_row = plan.send_row;
  return make_map(
      is_combine,
      &send_row,
      plan.expert_major ? &plan.recv_map : nullptr,
      send_row.size(0),
      plan.recv_map.size(0),
      send_row.size(1),
      &plan);
}

// Permutes rows, weights or both.
void permute(
    const RowMap& map,
    const at::Tensor* x,
    const at::Tensor* out,
    const at::Tensor* weights = nullptr,
    const at::Tensor* out_weights = nullptr) {
  PermuteArgs args{};
  args.map = map;
  if (x != nullptr) {
    args.x = data<char>(*x);
    args.out = mutable_data<char>(*out);
    args.row_bytes = x->size(1) * static_cast<int64_t>(x->element_size());
  }
  if (weights != nullptr) {
    args.weights = data<char>(*weights);
    args.out_weights = mutable_data<char>(*out_weights);
    args.weight_bytes = static_cast<int>(weights->element_size());
  }
  C10_CUDA_CHECK(launch_permute_rows(args, c10::cuda::getCurrentCUDAStream()));
}

void unpermute(
    const RowMap& map,
    const at::Tensor* y,
    const at::Tensor* out,
    const at::Tensor* row_weights,
    const at::Tensor* weights = nullptr,
    const at::Tensor* out_weights = nullptr) {
  UnpermuteArgs args{};
  args.map = map;
  at::Tensor wide_weights;
  if (y != nullptr) {
    args.element = element_of(y->scalar_type());
    args.y = data<char>(*y);
    args.out = mutable_data<char>(*out);
    args.hidden = y->size(1);
    if (row_weights != nullptr) {
      wide_weights = row_weights->to(y->scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
      args.row_weights = wide_weights.const_data_ptr();
    }
  }
  if (weights != nullptr) {
    args.weights = data<char>(*weights);
    args.out_weights = mutable_data<char>(*out_weights);
    args.weight_bytes = static_cast<int>(weights->element_size());
  }
  C10_CUDA_CHECK(launch_unpermute_rows(args, c10::cuda::getCurrentCUDAStream()));
}

const at::Tensor* pointer(const std::optional<at::Tensor>& t) {
  return t ? &*t : nullptr;
}

Payloads dispatch(
    const PlanTensors& plan,
    const at::Tensor& x,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const c10::cuda::CUDAGuard guard(x.device());
  Device::of(x).throw_reported();
  const auto [map, row_of] = make_map(false, plan);
  Payloads result{empty({map.rows, x.size(1)}, x), std::nullopt, std::nullopt};
  auto& [rows, row_weights, row_scales] = result;
  if (topk_weights) {
    row_weights = empty(plan.recv_map.sizes(), *topk_weights);
  }
  permute(map, &x, &rows, pointer(topk_weights), pointer(row_weights));
  if (scales) {
    row_scales = empty({map.rows, scales->size(1)}, *scales);
    permute(map, &*scales, &*row_scales);
  }
  return result;
}

Payloads combine(
    const PlanTensors& plan,
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const std::optional<at::Tensor>& topk_weights,
    const std::optional<at::Tensor>& scales) {
  const c10::cuda::CUDAGuard guard(y.device());
  Device::of(y).throw_reported();
  const auto [map, row_of] = make_map(true, plan);
  Payloads result{empty({map.items, y.size(1)}, y), std::nullopt, std::nullopt};
  auto& [sums, weights, scale_sums] = result;
  if (topk_weights) {
    weights = empty(plan.send_row.sizes(), *topk_weights);
  }
  unpermute(map, &y, &sums, pointer(row_weights), pointer(topk_weights), pointer(weights));
  if (scales) {
    scale_sums = empty({map.items, scales->size(1)}, *scales);
    unpermute(map, &*scales, &*scale_sums, nullptr);
  }
  return result;
}

// --- the parts of an exchange ---

void check_send_row(const char* op, const at::Tensor& send_row, int64_t wire_rows) {
  aten_kernels.check_send_row(op, send_row, wire_rows);
}

void check_recv_pair(const char* op, const at::Tensor& recv_pair, int64_t pairs) {
  aten_kernels.check_recv_pair(op, recv_pair, pairs);
}

at::Tensor pack_rows(const at::Tensor& x, const at::Tensor& send_row, int64_t wire_rows, const Allocate& /*allocate*/) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto wire = empty({wire_rows, x.size(1)}, x);
  permute(make_map(false, &send_row, nullptr, wire_rows, wire_rows, send_row.size(1)).map, &x, &wire);
  return wire;
}

at::Tensor pack_slots(const at::Tensor& w, const at::Tensor& send_row, int64_t wire_rows) {
  const c10::cuda::CUDAGuard guard(w.device());
  const auto wire = empty({wire_rows, send_row.size(1)}, w);
  const auto map = make_map(false, &send_row, nullptr, wire_rows, wire_rows, send_row.size(1));
  permute(map.map, nullptr, nullptr, &w, &wire);
  return wire;
}

at::Tensor expand_rows(const at::Tensor& wire, const at::Tensor& recv_pair, int64_t num_topk) {
  const c10::cuda::CUDAGuard guard(wire.device());
  const auto rows = empty({recv_pair.size(0), wire.size(1)}, wire);
  permute(make_map(false, nullptr, &recv_pair, wire.size(0), rows.size(0), num_topk).map, &wire, &rows);
  return rows;
}

at::Tensor expand_slots(const at::Tensor& wire, const at::Tensor& recv_pair) {
  const c10::cuda::CUDAGuard guard(wire.device());
  const auto rows = empty({recv_pair.size(0)}, wire);
  const auto map = make_map(false, nullptr, &recv_pair, wire.size(0), rows.size(0), wire.size(1));
  permute(map.map, nullptr, nullptr, &wire, &rows);
  return rows;
}

at::Tensor reduce_rows(
    const at::Tensor& y,
    const std::optional<at::Tensor>& row_weights,
    const at::Tensor& recv_pair,
    int64_t wire_rows,
    int64_t num_topk,
    const Allocate& /*allocate*/) {
  const c10::cuda::CUDAGuard guard(y.device());
  const auto wire = empty({wire_rows, y.size(1)}, y);
  const auto map = make_map(true, nullptr, &recv_pair, wire_rows, recv_pair.size(0), num_topk);
  unpermute(map.map, &y, &wire, pointer(row_weights));
  return wire;
}

at::Tensor return_slots(const at::Tensor& w, const at::Tensor& recv_pair, int64_t wire_rows, int64_t num_topk) {
  const c10::cuda::CUDAGuard guard(w.device());
  const auto wire = empty({wire_rows, num_topk}, w);
  const auto map = make_map(true, nullptr, &recv_pair, wire_rows, recv_pair.size(0), num_topk);
  unpermute(map.map, nullptr, nullptr, nullptr, &w, &wire);
  return wire;
}

at::Tensor sum_rows(const at::Tensor& wire, const at::Tensor& send_row) {
  const c10::cuda::CUDAGuard guard(wire.device());
  const auto tokens = empty({send_row.size(0), wire.size(1)}, wire);
  const auto map = make_map(true, &send_row, nullptr, wire.size(0), wire.size(0), send_row.size(1));
  unpermute(map.map, &wire, &tokens, nullptr);
  return tokens;
}

at::Tensor gather_slots(const at::Tensor& wire, const at::Tensor& send_row) {
  const c10::cuda::CUDAGuard guard(wire.device());
  const auto tokens = empty(send_row.sizes(), wire);
  const auto map = make_map(true, &send_row, nullptr, wire.size(0), wire.size(0), send_row.size(1));
  unpermute(map.map, nullptr, nullptr, nullptr, &wire, &tokens);
  return tokens;
}

bool run_on(const at::Tensor& t) {
  return Device::of(t).runs();
}

constexpr CudaKernels kKernels{
    .parts =
        {
            .plan_send = plan_send,
            .plan_recv = plan_recv,
            .check_send_row = check_send_row,
            .check_recv_pair = check_recv_pair,
            .pack_rows = pack_rows,
            .pack_slots = pack_slots,
            .expand_rows = expand_rows,
            .expand_slots = expand_slots,
            .reduce_rows = reduce_rows,
            .return_slots = return_slots,
            .sum_rows = sum_rows,
            .gather_slots = gather_slots,
        },
    .one_rank = {.plan = plan, .dispatch = dispatch, .combine = combine},
    .run_on = run_on,
};

// Registers the kernels when the library is loaded.
[[maybe_unused]] const bool is_registered = [] {
  cuda_kernels = &kKernels;
  return true;
}();

}  // namespace
}  // namespace ep
