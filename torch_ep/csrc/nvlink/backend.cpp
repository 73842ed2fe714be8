// The host side of the nvlink backend: converts tensors to kernel arguments and launches.
#include "core/backend.h"

#include "core/checks.h"
#include "core/cuda_stream.h"
#include "core/cuda_tensors.h"
#include "core/low_latency_wire_row.h"
#include "nvlink/errors.h"
#include "nvlink/limits.h"
#include "nvlink/low_latency.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

namespace ep::nvlink {
namespace {

using std::chrono::steady_clock;

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Rows as the kernels require them: their address and their size are multiples of 16 bytes. After an exact plan the
// device idles until the host launches the next kernel, so this code calls torch operators only where it must.
struct Rows {
  at::Tensor holder;
  const char* data;
  int64_t row_bytes;
};

at::Tensor as_bytes(const at::Tensor& t) {
  // A contiguous tensor with a size of one, or without elements, may have strides that `view` rejects.
  return t.as_strided(t.sizes(), {t.size(1), 1}).view(at::kByte);
}

Rows to_wire(const at::Tensor& t) {
  const int64_t row = t.size(1) * static_cast<int64_t>(t.element_size());
  const int64_t padded = std::max(kVector, round_up(row, kVector));
  at::Tensor holder = t;
  if (row != padded) {
    holder = at::zeros({t.size(0), padded}, t.options().dtype(at::kByte));
    if (row != 0) {
      holder.narrow(1, 0, row).copy_(as_bytes(t));
    }
  } else if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kVector != 0) {
    holder = t.clone();
  }
  return {holder, data<char>(holder), padded};
}

// Allocates a result of `rows` rows like those of `like`, padded to `padded` bytes.
at::Tensor wire_result(const at::Tensor& like, int64_t rows, int64_t padded) {
  const int64_t row = like.size(1) * static_cast<int64_t>(like.element_size());
  return row == padded ? empty({rows, like.size(1)}, like) : empty({rows, padded}, like, at::kByte);
}

// A result of wire_result without its padding.
at::Tensor from_wire(const at::Tensor& result, const at::Tensor& like) {
  if (result.scalar_type() == like.scalar_type() && result.size(1) == like.size(1)) {
    return result;
  }
  const auto rows = empty({result.size(0), like.size(1)}, like);
  if (like.size(1) != 0) {
    as_bytes(rows).copy_(result.narrow(1, 0, like.size(1) * static_cast<int64_t>(like.element_size())));
  }
  return rows;
}

int64_t element_bytes(const std::optional<at::Tensor>& t) {
  return t ? static_cast<int64_t>(t->element_size()) : 0;
}

int64_t bytes_per_row(const std::optional<at::Tensor>& t) {
  return t ? t->size(1) * static_cast<int64_t>(t->element_size()) : 0;
}

int multiprocessors_of(c10::DeviceIndex device) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

struct Options {
  std::string group_name;
  int64_t rank, world_size;
  at::IntArrayRef buffers;  // address of every rank's symmetric buffer, initially zero
  Limits limits;
  int64_t num_sms;
  int64_t timeout_ms;
  // Ranks without a process group: one alone, or several in one process.
  bool groupless;
  // Other ranks use this device as well: all thread blocks of all ranks have to fit on it at once.
  bool shares_device;
  // A timeout in the low-latency pair masks the peer instead of failing.
  bool masks;
};

cudaError_t prepare_kernels() {
  for (const auto prepare :
       {prepare_plan, prepare_dispatch, prepare_combine, prepare_low_latency_dispatch, prepare_low_latency_combine}) {
    if (const auto error = prepare(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

class Nvlink final : public Backend {
 public:
  explicit Nvlink(const Options& options)
      : group_name_(options.group_name),
        is_groupless_(options.groupless),
        layout_(layout_of(options.world_size, options.limits, options.num_sms)),
        max_tokens_(options.limits.max_tokens_per_rank),
        max_hidden_(options.limits.hidden),
        max_topk_(options.limits.num_topk),
        max_experts_(options.limits.num_experts),
        device_(c10::cuda::current_device()),
        // Ranks that share a device share it evenly: all their blocks have to fit on it at once.
        multiprocessors_(options.shares_device ? static_cast<int>(options.num_sms) : multiprocessors_of(device_)) {
    TORCH_CHECK_VALUE(
        max_experts_ <= most_experts(options.world_size),
        "torch_ep.init: expected num_experts of at most ",
        most_experts(options.world_size),
        " on backend nvlink, got ",
        max_experts_);
    TORCH_CHECK_VALUE(
        max_tokens_ <= kMaxTokens,
        "torch_ep.init: expected max_tokens_per_rank of at most ",
        kMaxTokens,
        " on backend nvlink, got ",
        max_tokens_);
    C10_CUDA_CHECK(prepare_kernels());
    const auto bytes = at::TensorOptions().device(at::kCUDA, device_).dtype(at::kByte);
    state_ = at::zeros({static_cast<int64_t>(sizeof(State))}, bytes);
    rows_of_ = at::zeros({layout_.world_size * layout_.max_tokens * layout_.num_topk * int64_t{8}}, bytes);
    void* host_report = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&host_report, sizeof(HostReport), cudaHostAllocPortable | cudaHostAllocMapped));
    host_report_ = static_cast<HostReport*>(host_report);
    *host_report_ = {};
    comm_ = {};
    for (int r = 0; r < layout_.world_size; ++r) {
      comm_.buffers[r] = reinterpret_cast<char*>(options.buffers[r]);
    }
    comm_.state = reinterpret_cast<State*>(mutable_data<char>(state_));
    comm_.host_report = host_report_;
    comm_.rows_of = reinterpret_cast<uint64_t*>(mutable_data<char>(rows_of_));
    comm_.layout = layout_;
    comm_.low_latency = low_latency_layout_of(layout_, options.limits);
    comm_.rank = static_cast<int>(options.rank);
    comm_.shares_device = options.shares_device;
    comm_.timeout_ns = options.timeout_ms * 1'000'000;
    comm_.masks = options.masks;
    low_latency_.emplace(comm_, LowLatencyLimits{max_hidden_, max_topk_, max_experts_}, multiprocessors_);
    C10_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));
  }

  ~Nvlink() override { static_cast<void>(cudaFreeHost(host_report_)); }

  PlanResult plan(const at::Tensor& topk_idx, const PlanOptions& options) override {
    constexpr auto kOp = OpKind::plan;
    const int64_t num_tokens = topk_idx.size(0), num_topk = topk_idx.size(1);
    check_limit(name_of(kOp), "num_topk", max_topk_, num_topk);
    check_limit(name_of(kOp), "num_experts", max_experts_, options.num_experts);
    const int64_t most_tokens = std::min(options.max_tokens_per_rank.value_or(max_tokens_), max_tokens_);
    const bool exact = !options.capacity;
    const c10::cuda::CUDAGuard guard(device_);
    TORCH_CHECK(
        !exact || !is_capturing(),
        "ep::plan: expected a capacity while a CUDA graph is captured: an exact plan waits for the number of rows");
    const auto stream = enter();

    const int64_t num_local_experts = options.num_experts / layout_.world_size;
    int64_t rows = options.capacity.value_or(layout_.world_size * most_tokens);
    if (exact && options.expert_major) {
      // Allocate the maximum number of rows: indices are small, and the kernel need not wait for the host once it has
      // counted.
      rows = rows * std::min(num_topk, num_local_experts) + num_local_experts * (options.alignment - 1);
    }
    const auto ints = [&](at::IntArrayRef sizes) { return empty(sizes, topk_idx, at::kInt); };
    const auto send_row = ints({num_tokens, num_topk});
    const auto send_counts = ints({layout_.world_size});
    const auto recv_counts = ints({layout_.world_size});
    const auto recv_map = options.expert_major ? ints({rows}) : empty({rows, num_topk}, topk_idx);
    const auto offsets = ints({options.expert_major ? num_local_experts : layout_.world_size});
    const auto tokens_per_expert = ints({num_local_experts});
    const auto num_dropped = ints({});

    PlanArgs args{};
    args.comm = comm_;
    args.handshake.num_experts = static_cast<int32_t>(options.num_experts);
    args.handshake.num_topk = static_cast<int32_t>(num_topk);
    args.topk_idx = topk_idx.const_data_ptr();
    args.wide_idx = topk_idx.scalar_type() == at::kLong;
    args.num_tokens = static_cast<int>(num_tokens);
    args.num_topk = static_cast<int>(num_topk);
    args.num_experts = static_cast<int>(options.num_experts);
    args.expert_major = options.expert_major;
    args.alignment = static_cast<int>(options.alignment);
    args.capacity = options.capacity.value_or(-1);
    args.map_rows = rows;
    args.refused = num_tokens > most_tokens;
    args.send_row = mutable_data<int32_t>(send_row);
    args.send_counts = mutable_data<int32_t>(send_counts);
    args.recv_counts = mutable_data<int32_t>(recv_counts);
    args.recv_map = recv_map.mutable_data_ptr();
    args.offsets = mutable_data<int32_t>(offsets);
    args.tokens_per_expert = mutable_data<int32_t>(tokens_per_expert);
    args.num_dropped = mutable_data<int32_t>(num_dropped);
    last_tokens_ = num_tokens;
    last_most_tokens_ = most_tokens;
    if (exact) {
      host_report_->plan = 0;
    }
    C10_CUDA_CHECK(launch_plan(args, stream));
    if (args.refused && !exact) {
      // The kernel reports to the peers; this rank does not wait.
      TORCH_CHECK_VALUE(false, refusal(num_tokens, most_tokens));
    }
    if (exact) {
      // Resized, not viewed: the tensor has no other owner yet.
      auto sizes = recv_map.sizes().vec();
      sizes[0] = await_rows(stream);
      recv_map.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    }
    return {send_row, send_counts, recv_counts, recv_map, offsets, tokens_per_expert, num_dropped};
  }

  Payloads dispatch(
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override {
    check_limit(name_of(OpKind::dispatch), "hidden", max_hidden_, x.size(1));
    const c10::cuda::CUDAGuard guard(device_);
    const auto stream = enter();
    const int64_t num_topk = plan.send_row.size(1), rows = plan.recv_map.size(0);
    Payloads result{at::Tensor(), std::nullopt, std::nullopt};
    DispatchArgs args{};
    args.comm = comm_;
    args.plan = view_of(plan);
    args.format.weight_bytes = static_cast<int>(element_bytes(topk_weights));
    args.handshake = handshake_of(x, topk_weights, scales, num_topk);
    if (topk_weights) {
      std::get<1>(result) = empty(plan.recv_map.sizes(), *topk_weights);
      args.weights = data<char>(*topk_weights);
      args.out_weights = mutable_data<char>(*std::get<1>(result));
    }
    // Scales are part of the wire row if they and the weights take at most half of it.
    const int64_t scale_bytes = bytes_per_row(scales);
    const bool beside = 2 * (round_up(scale_bytes, kVector) + wire_row_tail(args.format, num_topk)) <= wire_row_limit();
    if (scales && beside) {
      std::get<2>(result) = empty({rows, scales->size(1)}, *scales);
      args.format.scale_bytes = static_cast<int>(scale_bytes);
      args.scales = data<char>(*scales);
      args.out_scales = mutable_data<char>(*std::get<2>(result));
    }
    std::get<0>(result) = dispatch_rows(args, x, rows, stream);
    if (scales && !beside) {
      args.format.weight_bytes = args.format.scale_bytes = 0;
      std::get<2>(result) = dispatch_rows(args, *scales, rows, stream);
    }
    return result;
  }

  Payloads combine(
      const PlanTensors& plan,
      const at::Tensor& y,
      const std::optional<at::Tensor>& row_weights,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override {
    check_limit(name_of(OpKind::combine), "hidden", max_hidden_, y.size(1));
    const c10::cuda::CUDAGuard guard(device_);
    const auto stream = enter();
    const int64_t num_topk = plan.send_row.size(1), num_tokens = plan.send_row.size(0);
    Payloads result{at::Tensor(), std::nullopt, std::nullopt};
    CombineArgs args{};
    args.comm = comm_;
    args.plan = view_of(plan);
    args.format.weight_bytes = static_cast<int>(element_bytes(topk_weights));
    args.handshake = handshake_of(y, topk_weights, scales, num_topk);
    at::Tensor wide_weights;
    if (row_weights) {
      wide_weights = row_weights->to(y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
      args.row_weights = wide_weights.const_data_ptr();
    }
    if (topk_weights) {
      std::get<1>(result) = empty({num_tokens, num_topk}, *topk_weights);
      args.weights = data<char>(*topk_weights);
      args.out_weights = mutable_data<char>(*std::get<1>(result));
    }
    std::get<0>(result) = combine_rows(args, y, num_tokens, stream);
    if (scales) {
      args.format.weight_bytes = 0;
      std::get<2>(result) = combine_rows(args, *scales, num_tokens, stream);
    }
    return result;
  }

  LowLatencyRows low_latency_dispatch(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) override {
    const c10::cuda::CUDAGuard guard(device_);
    return low_latency_->dispatch(x, topk_idx, topk_weights, options, enter());
  }

  InFlight low_latency_dispatch_send(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto status = low_latency_->dispatch_send(x, topk_idx, topk_weights, options, enter());
    const int64_t rows = layout_.world_size * options.max_tokens_per_rank;
    return {status, empty({rows, LowLatencyWireRow(options).bytes}, status, at::kByte)};
  }

  LowLatencyRows low_latency_dispatch_recv(const InFlight& sent, const LowLatencyOptions& options) override {
    const c10::cuda::CUDAGuard guard(device_);
    return low_latency_->dispatch_recv(std::get<0>(sent), options, enter());
  }

  LowLatencySums low_latency_combine(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) override {
    const c10::cuda::CUDAGuard guard(device_);
    return low_latency_->combine(y, topk_idx, row_weights, recv_row, num_experts, enter());
  }

  InFlight low_latency_combine_send(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto status = low_latency_->combine_send(y, topk_idx, row_weights, recv_row, num_experts, enter());
    const int64_t row_bytes = y.size(2) * static_cast<int64_t>(y.element_size());
    return {status, empty({recv_row.size(0), row_bytes}, status, at::kByte)};
  }

  LowLatencySums low_latency_combine_recv(
      const InFlight& sent,
      const at::Tensor& topk_idx,
      int64_t hidden,
      at::ScalarType dtype,
      int64_t num_experts) override {
    const c10::cuda::CUDAGuard guard(device_);
    return low_latency_->combine_recv(std::get<0>(sent), topk_idx, hidden, dtype, num_experts, enter());
  }

  bool takes(const at::Tensor& t) const { return t.is_cuda() && t.get_device() == device_; }
  bool is_groupless() const { return is_groupless_; }
  int64_t world_size() const { return layout_.world_size; }

  // The local steps of torch_ep.reset. `settle` waits for the device and returns the last exchange; `restart` continues
  // after exchange `epoch`.
  int64_t settle() {
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    State state{};
    C10_CUDA_CHECK(cudaMemcpy(&state, comm_.state, sizeof(state), cudaMemcpyDeviceToHost));
    uint64_t epoch = state.epoch;
    for (const auto& kind : state.low_latency) {
      epoch = std::max(epoch, kind.sent >> kShareBits);
    }
    return static_cast<int64_t>(epoch);
  }

  void restart(int64_t epoch) {
    const c10::cuda::CUDAGuard guard(device_);
    State state{};
    state.epoch = static_cast<uint64_t>(epoch);
    for (auto& kind : state.low_latency) {
      kind.sent = kind.received = static_cast<uint64_t>(epoch) << kShareBits;
    }
    C10_CUDA_CHECK(cudaMemcpy(comm_.state, &state, sizeof(state), cudaMemcpyHostToDevice));
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    *host_report_ = {};
    fatal_.clear();
    std::fill(std::begin(masked_), std::end(masked_), 0);
  }

  // Bits of the ranks that this rank's low-latency pair excludes. `mask` adds some.
  int64_t masked() const {
    uint32_t by_host[kRankSteps] = {}, by_timeout[kRankSteps] = {};
    const Stream stream;
    stream.copy(by_host, comm_.state->masked_by_host, sizeof(by_host));
    stream.copy(by_timeout, comm_.state->masked_by_timeout, sizeof(by_timeout));
    uint64_t ranks = 0;
    for (int i = 0; i < kRankSteps; ++i) {
      ranks |= static_cast<uint64_t>(by_host[i] | by_timeout[i]) << i * kWarpLanes;
    }
    return static_cast<int64_t>(ranks);
  }

  void mask(int64_t ranks) {
    for (int i = 0; i < kRankSteps; ++i) {
      masked_[i] |= static_cast<uint32_t>(static_cast<uint64_t>(ranks) >> i * kWarpLanes);
    }
    Stream().copy(comm_.state->masked_by_host, masked_, sizeof(masked_));
  }

  // Throws the failure that a kernel reported since the last call. After a timeout every call throws, until a reset.
  void throw_failure() {
    if (!fatal_.empty()) {
      C10_THROW_ERROR(DistError, fatal_);
    }
    const int64_t stopped = std::atomic_ref<int64_t>(host_report_->stopped).load(std::memory_order_acquire);
    std::atomic_ref<Failure> reported(host_report_->failure.kind);
    const Failure kind = reported.load(std::memory_order_acquire);
    if (kind == Failure::none) {
      if (stopped != 0) {
        std::ostringstream message;
        message << "torch_ep: a wait timed out in exchange " << stopped << " of group '" << group_name_
                << "', after a failure that was raised before: torch_ep.reset(group) on every rank makes the group "
                   "usable again";
        fatal_ = message.str();
        C10_THROW_ERROR(DistError, fatal_);
      }
      return;
    }
    const FailureReport report = host_report_->failure;
    if (is_fatal(kind)) {
      fatal_ = describe(group_name_, comm_, report);
      C10_THROW_ERROR(DistError, fatal_);
    }
    reported.store(Failure::none, std::memory_order_release);
    // If several ranks have too many tokens, each throws its own number, whichever report arrived first.
    const bool too_many = kind == Failure::too_many_tokens;
    const bool is_own = report.peer == comm_.rank, all_refused = too_many && last_tokens_ > last_most_tokens_;
    const bool own_topk = (kind == Failure::bad_expert || kind == Failure::duplicate_expert || too_many) && is_own;
    const bool own_argument =
        kind == Failure::bad_send_row || kind == Failure::bad_recv_pair || all_refused || own_topk;
    if (!own_argument) {
      C10_THROW_ERROR(DistError, describe(group_name_, comm_, report));
    }
    TORCH_CHECK_VALUE(!too_many, refusal(last_tokens_, last_most_tokens_));
    TORCH_CHECK_VALUE(false, describe(group_name_, comm_, report));
  }

  // Whether all kernels have ended, so that their memory can be freed.
  bool is_idle() const {
    const c10::cuda::CUDAGuard guard(device_);
    const auto status = last_stream_ ? cudaStreamQuery(*last_stream_) : cudaSuccess;
    if (status != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
    }
    return status == cudaSuccess;
  }

 private:
  // --- exchanges ---

  // Called before every operator. Orders the exchanges of one communicator across streams.
  c10::cuda::CUDAStream enter() {
    throw_failure();
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (last_stream_ == stream || is_capturing()) {
      return stream;
    }
    if (last_stream_) {
      cudaEvent_t event = nullptr;
      C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      C10_CUDA_CHECK(cudaEventRecord(event, *last_stream_));
      C10_CUDA_CHECK(cudaStreamWaitEvent(stream, event));
      C10_CUDA_CHECK(cudaEventDestroy(event));
    }
    last_stream_ = stream;
    return stream;
  }

  PlanView view_of(const PlanTensors& plan) const {
    PlanView view{};
    view.send_row = data<int32_t>(plan.send_row);
    view.send_counts = data<int32_t>(plan.send_counts);
    view.recv_counts = data<int32_t>(plan.recv_counts);
    view.expert_major = plan.expert_major;
    if (plan.expert_major) {
      view.recv_pair = data<int32_t>(plan.recv_map);
    } else {
      view.recv_topk_idx = plan.recv_map.const_data_ptr();
      view.wide_idx = plan.recv_map.scalar_type() == at::kLong;
    }
    view.num_tokens = static_cast<int>(plan.send_row.size(0));
    view.num_topk = static_cast<int>(plan.send_row.size(1));
    view.rows = plan.recv_map.size(0);
    return view;
  }

  // The sizes and dtypes on which all ranks must agree.
  static Handshake handshake_of(
      const at::Tensor& rows,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales,
      int64_t num_topk) {
    Handshake handshake{};
    handshake.hidden = static_cast<int32_t>(rows.size(1));
    handshake.dtype = static_cast<int32_t>(rows.scalar_type());
    handshake.weight_bytes = static_cast<int32_t>(element_bytes(topk_weights) * num_topk);
    handshake.weight_dtype = handshake.weight_bytes > 0 ? static_cast<int32_t>(topk_weights->scalar_type()) : 0;
    handshake.scale_bytes = static_cast<int32_t>(bytes_per_row(scales));
    handshake.scale_dtype = handshake.scale_bytes > 0 ? static_cast<int32_t>(scales->scalar_type()) : 0;
    return handshake;
  }

  int64_t wire_row_limit() const { return std::min<int64_t>(layout_.wire_row_bytes, max_wire_row_bytes()); }

  static int64_t wire_row_tail(WireFormat format, int64_t num_topk) {
    format.row_bytes = 0;
    return format.bytes(static_cast<int>(num_topk));
  }

  // Runs one exchange per slice of columns that fits into a wire row. The first one also sends weights and scales.
  template <class Args, class Launch>
  void by_columns(Args& args, int64_t row_bytes, int64_t num_topk, Launch launch) const {
    args.format.row_stride = row_bytes;
    const int64_t widest = (wire_row_limit() - wire_row_tail(args.format, num_topk)) / kVector * kVector;
    for (int64_t begin = 0; begin < row_bytes; begin += widest) {
      args.format.row_bytes = static_cast<int>(std::min(widest, row_bytes - begin));
      launch(begin);
      args.format.weight_bytes = args.format.scale_bytes = 0;
    }
  }

  at::Tensor dispatch_rows(DispatchArgs& args, const at::Tensor& x, int64_t rows, cudaStream_t stream) const {
    const auto wire = to_wire(x);
    const auto result = wire_result(x, rows, wire.row_bytes);
    by_columns(args, wire.row_bytes, args.plan.num_topk, [&](int64_t begin) {
      args.x = wire.data + begin;
      args.out = mutable_data<char>(result) + begin;
      C10_CUDA_CHECK(launch_dispatch(args, stream));
    });
    return from_wire(result, x);
  }

  at::Tensor combine_rows(CombineArgs& args, const at::Tensor& y, int64_t num_tokens, cudaStream_t stream) const {
    const auto wire = to_wire(y);
    const auto result = wire_result(y, num_tokens, wire.row_bytes);
    args.element = element_of(y.scalar_type());
    by_columns(args, wire.row_bytes, args.plan.num_topk, [&](int64_t begin) {
      args.y = wire.data + begin;
      args.out = mutable_data<char>(result) + begin;
      C10_CUDA_CHECK(launch_combine(args, stream));
    });
    return from_wire(result, y);
  }

  // --- the exact plan ---

  // Waits for the number of rows of an exact plan.
  int64_t await_rows(cudaStream_t stream) {
    // The kernel's own waits time out. The query detects a kernel that ended without a result, or never began.
    constexpr auto kQueryEvery = std::chrono::milliseconds(10);
    auto next_query = steady_clock::now() + kQueryEvery;
    std::atomic_ref<uint64_t> word(host_report_->plan);
    uint64_t reply = 0;
    while ((reply = word.load(std::memory_order_acquire)) == 0) {
      if (steady_clock::now() < next_query) {
        continue;
      }
      next_query += kQueryEvery;
      const auto status = cudaStreamQuery(stream);
      if (status != cudaErrorNotReady) {
        C10_CUDA_CHECK(status);
        TORCH_CHECK(word.load(std::memory_order_acquire) != 0, "ep::plan: the kernel ended without a result");
      }
      std::this_thread::yield();
    }
    if ((reply & kPlanFailed) != 0) {
      C10_CUDA_CHECK(cudaStreamSynchronize(stream));
      throw_failure();
      TORCH_CHECK(false, "ep::plan: the kernel reported a failure without a record");
    }
    return static_cast<int64_t>(reply & (kPlanFailed - 1));
  }

  // --- errors ---

  std::string refusal(int64_t num_tokens, int64_t most) const {
    std::ostringstream message;
    message << "ep::plan: expected at most max_tokens_per_rank = " << most << " tokens, got " << num_tokens;
    return message.str();
  }

  const std::string group_name_;
  const bool is_groupless_;
  const Layout layout_;
  const int64_t max_tokens_, max_hidden_, max_topk_, max_experts_;
  const c10::DeviceIndex device_;
  const int multiprocessors_;
  at::Tensor state_, rows_of_;
  HostReport* host_report_ = nullptr;
  Comm comm_;
  std::optional<LowLatencyPair> low_latency_;  // once comm_ is complete
  std::optional<c10::cuda::CUDAStream> last_stream_;
  uint32_t masked_[kRankSteps] = {};  // State::masked_by_host
  // The last plan's, for the error about too many tokens.
  int64_t last_tokens_ = 0, last_most_tokens_ = 0;
  std::string fatal_;
};

// --- the registry ---

std::mutex registry_mutex;

std::map<std::string, std::shared_ptr<Nvlink>>& registry() {
  // Never destroyed: the process may exit while kernels run.
  static auto* backends = new std::map<std::string, std::shared_ptr<Nvlink>>();
  return *backends;
}

std::shared_ptr<Nvlink> registered(const std::string& group_name) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(group_name);
  return found == registry().end() ? nullptr : found->second;
}

std::shared_ptr<Nvlink> existing(const char* caller, const std::string& group_name) {
  auto backend = registered(group_name);
  TORCH_CHECK(backend, caller, ": group '", group_name, "' does not use the nvlink backend");
  return backend;
}

// False: a kernel still runs, so the buffers have to stay. A name without a backend is no error.
bool destroy(std::string group_name) {
  static auto* busy = new std::vector<std::shared_ptr<Nvlink>>();
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(group_name);
  if (found == registry().end()) {
    return true;
  }
  const bool idle = found->second->is_idle();
  if (!idle) {
    busy->push_back(found->second);
  }
  registry().erase(found);
  return idle;
}

std::shared_ptr<Backend>
find_nvlink(OpKind op, const std::string& group_name, int64_t world_size, const at::Tensor& t) {
  auto backend = registered(group_name);
  if (!backend || !backend->takes(t)) {
    return nullptr;
  }
  // A process without a group exchanges nothing: the local backend runs plan, dispatch and combine. A single virtual
  // rank runs the nvlink kernels.
  const bool is_low_latency = op == OpKind::low_latency_dispatch || op == OpKind::low_latency_combine;
  if (group_name.empty() && !is_low_latency) {
    backend->throw_failure();
    return nullptr;
  }
  if (!backend->is_groupless()) {
    check_group(op, group_name, world_size);
  }
  TORCH_CHECK_VALUE(
      backend->world_size() == world_size,
      name_of(op),
      ": expected world_size ",
      backend->world_size(),
      " (the size of group '",
      group_name,
      "'), got ",
      world_size);
  return backend;
}

// The kernels of the other ranks wait on the device; their own timeout ends them.
bool report_failure(OpKind op, const std::string& group_name, const std::string& /*failure*/) {
  return op != OpKind::init && registered(group_name) != nullptr;
}

const BackendRegistration registration(
    {.name = "nvlink", .order = 0, .find = find_nvlink, .report_failure = report_failure});

// Local. The group's communicator must exist, unless groupless. Returns the result of `destroy` for the replaced
// backend.
bool init(
    std::string group_name,
    int64_t rank,
    int64_t world_size,
    at::IntArrayRef buffers,
    int64_t max_tokens_per_rank,
    int64_t hidden,
    int64_t num_topk,
    int64_t num_experts,
    int64_t low_latency_tokens,
    int64_t num_sms,
    int64_t timeout_ms,
    bool groupless,
    bool shares_device,
    bool masks) {
  const Limits limits{max_tokens_per_rank, hidden, num_topk, num_experts, low_latency_tokens};
  auto backend = std::make_shared<Nvlink>(
      Options{group_name, rank, world_size, buffers, limits, num_sms, timeout_ms, groupless, shares_device, masks});
  const bool was_idle = destroy(group_name);
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[group_name] = std::move(backend);
  return was_idle;
}

// Whether the kernels were built for the current device.
bool kernels_run() {
  const bool run = prepare_kernels() == cudaSuccess;
  if (!run) {
    static_cast<void>(cudaGetLastError());
  }
  return run;
}

int64_t settle(std::string group_name) {
  return existing("torch_ep.reset", group_name)->settle();
}

void restart(std::string group_name, int64_t epoch) {
  existing("torch_ep.reset", group_name)->restart(epoch);
}

int64_t masked(std::string group_name) {
  return existing("torch_ep.active_ranks", group_name)->masked();
}

void mask(std::string group_name, int64_t ranks) {
  existing("torch_ep.mask_ranks", group_name)->mask(ranks);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ep, m) {
  m.def("_nvlink_runs() -> bool", &kernels_run);
  m.def(
      "_init_nvlink(str group_name, int rank, int world_size, int[] buffers, *, int max_tokens_per_rank, int hidden, "
      "int num_topk, int num_experts, int low_latency_tokens, int num_sms, int timeout_ms, bool groupless, bool "
      "shares_device, "
      "bool masks) "
      "-> bool",
      &init);
  m.def("_destroy_nvlink(str group_name) -> bool", &destroy);
  m.def("_settle_nvlink(str group_name) -> int", &settle);
  m.def("_restart_nvlink(str group_name, int epoch) -> ()", &restart);
  m.def("_masked_nvlink(str group_name) -> int", &masked);
  m.def("_mask_nvlink(str group_name, int ranks) -> ()", &mask);
}

}  // namespace ep::nvlink
