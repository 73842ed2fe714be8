// The nvlink transport on the host: tensors to kernel arguments, and what a kernel reports to an error.
#include "nvlink.h"

#include "launch.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <sstream>
#include <thread>

namespace ep::cuda {
namespace {

using std::chrono::steady_clock;

constexpr int64_t kVector = 16;  // bytes: rows are copied in these

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Rows as the kernels take them: bytes, a multiple of 16 a row, from an address that is one.
at::Tensor to_wire(const at::Tensor& t) {
  const auto bytes = t.view(at::kByte);
  const int64_t row = bytes.size(1), padded = std::max(kVector, round_up(row, kVector));
  if (row == padded) {
    return reinterpret_cast<uintptr_t>(bytes.const_data_ptr()) % kVector == 0 ? bytes : bytes.clone();
  }
  auto result = at::zeros({bytes.size(0), padded}, bytes.options());
  result.narrow(1, 0, row).copy_(bytes);
  return result;
}

// A result of `rows` rows like those of `like`, padded as to_wire does, and without the padding.
at::Tensor wire_result(const at::Tensor& like, int64_t rows, int64_t padded) {
  const int64_t row = like.size(1) * like.element_size();
  return row == padded ? at::empty({rows, like.size(1)}, like.options())
                       : at::empty({rows, padded}, like.options().dtype(at::kByte));
}

at::Tensor from_wire(const at::Tensor& result, const at::Tensor& like) {
  if (result.scalar_type() == like.scalar_type() && result.size(1) == like.size(1)) {
    return result;
  }
  return result.narrow(1, 0, like.size(1) * like.element_size()).contiguous().view(like.scalar_type());
}

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Element::f64;
    case at::kFloat:
      return Element::f32;
    case at::kBFloat16:
      return Element::bf16;
    default:
      return Element::f16;
  }
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

cudaError_t prepare_kernels() {
  for (const auto prepare :
       {prepare_plan, prepare_dispatch, prepare_combine, prepare_low_latency_dispatch, prepare_low_latency_combine}) {
    if (const auto error = prepare(); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

template <class T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A stream that waits for no kernel, for a few words.
class Stream {
 public:
  Stream() { C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }

  void copy(void* to, const void* from, size_t bytes) const {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
};

class Nvlink final : public Transport {
 public:
  explicit Nvlink(const NvlinkOptions& options)
      : group_name_(options.group_name),
        layout_(layout_of(options.world_size, options.limits, options.num_sms)),
        low_latency_(low_latency_layout_of(layout_, options.limits)),
        max_tokens_(options.limits[0]),
        max_hidden_(options.limits[1]),
        max_topk_(options.limits[2]),
        max_experts_(options.limits[3]),
        timeout_(options.timeout_ms),
        device_(c10::cuda::current_device()),
        // Ranks that share a device share it evenly: all their blocks have to fit on it at once.
        multiprocessors_(
            options.groupless && options.world_size > 1 ? static_cast<int>(options.num_sms)
                                                        : multiprocessors_of(device_)) {
    TORCH_CHECK_VALUE(
        max_experts_ <= most_experts(options.world_size),
        "torch_ep.init: expected num_experts of at most ",
        most_experts(options.world_size),
        " on transport nvlink, got ",
        max_experts_);
    TORCH_CHECK_VALUE(
        max_tokens_ <= kMaxTokens,
        "torch_ep.init: expected max_tokens_per_rank of at most ",
        kMaxTokens,
        " on transport nvlink, got ",
        max_tokens_);
    C10_CUDA_CHECK(prepare_kernels());
    const auto bytes = at::TensorOptions().device(at::kCUDA, device_).dtype(at::kByte);
    state_ = at::zeros({static_cast<int64_t>(sizeof(State))}, bytes);
    rows_of_ = at::zeros({layout_.world_size * layout_.max_tokens * layout_.num_topk * int64_t{8}}, bytes);
    void* mailbox = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&mailbox, sizeof(Mailbox), cudaHostAllocPortable | cudaHostAllocMapped));
    mailbox_ = static_cast<Mailbox*>(mailbox);
    *mailbox_ = {};
    comm_ = {};
    for (int r = 0; r < layout_.world_size; ++r) {
      comm_.buffers[r] = reinterpret_cast<char*>(options.buffers[r]);
    }
    comm_.state = reinterpret_cast<State*>(mutable_data<char>(state_));
    comm_.mailbox = mailbox_;
    comm_.rows_of = reinterpret_cast<uint64_t*>(mutable_data<char>(rows_of_));
    comm_.layout = layout_;
    comm_.low_latency = low_latency_;
    comm_.rank = static_cast<int>(options.rank);
    comm_.timeout_ns = options.timeout_ms * 1'000'000;
    comm_.masks = options.masks;
    C10_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));
  }

  ~Nvlink() override { static_cast<void>(cudaFreeHost(mailbox_)); }

  PlanResult plan(const at::Tensor& topk_idx, const PlanOptions& options) override {
    constexpr auto kOp = OpKind::plan;
    const int64_t num_tokens = topk_idx.size(0), num_topk = topk_idx.size(1);
    check_limit(kOp, "num_topk", max_topk_, num_topk);
    check_limit(kOp, "num_experts", max_experts_, options.num_experts);
    const bool exact = !options.capacity;
    const c10::cuda::CUDAGuard guard(device_);
    TORCH_CHECK(
        !exact || !is_capturing(),
        "ep::plan: expected a capacity while a CUDA graph is captured: an exact plan waits for the number of rows");
    const auto stream = enter();

    const int64_t most_tokens = std::min(options.max_tokens_per_rank.value_or(max_tokens_), max_tokens_);
    const int64_t num_local_experts = options.num_experts / layout_.world_size;
    int64_t rows = options.capacity.value_or(layout_.world_size * most_tokens);
    if (exact && options.expert_major) {
      // Room for as many rows as could come: indices are small, and so the kernel need not stop where it counts them.
      rows = rows * std::min(num_topk, num_local_experts) + num_local_experts * (options.alignment - 1);
    }
    const auto ints = topk_idx.options().dtype(at::kInt);
    const auto send_slot = at::empty({num_tokens, num_topk}, ints);
    const auto send_counts = at::empty({layout_.world_size}, ints);
    const auto recv_counts = at::empty({layout_.world_size}, ints);
    auto recv_map = options.expert_major ? at::empty({rows}, ints) : at::empty({rows, num_topk}, topk_idx.options());
    const auto offsets = at::empty({options.expert_major ? num_local_experts : layout_.world_size}, ints);
    const auto tokens_per_expert = at::empty({num_local_experts}, ints);
    const auto num_dropped = at::empty({}, ints);

    PlanArgs args{};
    args.comm = comm_;
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
    args.send_slot = mutable_data<int32_t>(send_slot);
    args.send_counts = mutable_data<int32_t>(send_counts);
    args.recv_counts = mutable_data<int32_t>(recv_counts);
    args.recv_map = recv_map.mutable_data_ptr();
    args.offsets = mutable_data<int32_t>(offsets);
    args.tokens_per_expert = mutable_data<int32_t>(tokens_per_expert);
    args.num_dropped = mutable_data<int32_t>(num_dropped);
    last_tokens_ = num_tokens;
    last_most_tokens_ = most_tokens;
    if (exact) {
      mailbox_->plan_epoch = 0;
    }
    C10_CUDA_CHECK(launch_plan(args, stream));
    if (args.refused && !exact) {
      // The kernel tells the peers; this rank need not wait to know.
      TORCH_CHECK_VALUE(false, refusal(num_tokens, most_tokens));
    }
    if (exact) {
      recv_map = recv_map.narrow(0, 0, await_rows(stream));
    }
    return {send_slot, send_counts, recv_counts, recv_map, offsets, tokens_per_expert, num_dropped};
  }

  Payloads dispatch(
      const PlanTensors& plan,
      const at::Tensor& x,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales) override {
    check_limit(OpKind::dispatch, "hidden", max_hidden_, x.size(1));
    const c10::cuda::CUDAGuard guard(device_);
    const auto stream = enter();
    const int64_t num_topk = plan.send_slot.size(1), rows = plan.recv_map.size(0);
    Payloads result{at::Tensor(), std::nullopt, std::nullopt};
    DispatchArgs args{};
    args.comm = comm_;
    args.plan = view_of(plan);
    args.record.weight_bytes = static_cast<int>(element_bytes(topk_weights));
    set_agreed(args.agreed, x, topk_weights, scales, num_topk);
    if (topk_weights) {
      auto sizes = plan.recv_map.sizes().vec();
      std::get<1>(result) = at::empty(sizes, topk_weights->options());
      args.weights = data<char>(*topk_weights);
      args.out_weights = mutable_data<char>(*std::get<1>(result));
    }
    // Scales travel in the row's record if there is room beside at least as much of the row.
    const int64_t scale_bytes = bytes_per_row(scales);
    const bool beside = 2 * (round_up(scale_bytes, kVector) + record_tail(args.record, num_topk)) <= record_limit();
    if (scales && beside) {
      std::get<2>(result) = at::empty({rows, scales->size(1)}, scales->options());
      args.record.scale_bytes = static_cast<int>(scale_bytes);
      args.scales = data<char>(*scales);
      args.out_scales = mutable_data<char>(*std::get<2>(result));
    }
    std::get<0>(result) = dispatch_rows(args, x, rows, stream);
    if (scales && !beside) {
      args.record.weight_bytes = args.record.scale_bytes = 0;
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
    check_limit(OpKind::combine, "hidden", max_hidden_, y.size(1));
    const c10::cuda::CUDAGuard guard(device_);
    const auto stream = enter();
    const int64_t num_topk = plan.send_slot.size(1), num_tokens = plan.send_slot.size(0);
    Payloads result{at::Tensor(), std::nullopt, std::nullopt};
    CombineArgs args{};
    args.comm = comm_;
    args.plan = view_of(plan);
    args.record.weight_bytes = static_cast<int>(element_bytes(topk_weights));
    set_agreed(args.agreed, y, topk_weights, scales, num_topk);
    at::Tensor wide_weights;
    if (row_weights) {
      wide_weights = row_weights->to(y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
      args.row_weights = wide_weights.const_data_ptr();
    }
    if (topk_weights) {
      std::get<1>(result) = at::empty({num_tokens, num_topk}, topk_weights->options());
      args.weights = data<char>(*topk_weights);
      args.out_weights = mutable_data<char>(*std::get<1>(result));
    }
    std::get<0>(result) = combine_rows(args, y, num_tokens, stream);
    if (scales) {
      args.record.weight_bytes = 0;
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
    auto args = low_latency_args(options, Part::both);
    const auto rows = aligned(x);
    set_tokens(args, rows, topk_idx, topk_weights);
    auto result = low_latency_results(args, options, x.options());
    C10_CUDA_CHECK(launch_low_latency_dispatch(args, multiprocessors_, enter()));
    check_tokens(x.size(0), options);
    return result;
  }

  at::Tensor low_latency_dispatch_send(
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights,
      const LowLatencyOptions& options) override {
    const c10::cuda::CUDAGuard guard(device_);
    if (x.size(0) > options.max_tokens_per_rank) {
      low_latency_dispatch(x, topk_idx, topk_weights, options);  // throws; nothing is left on its way
    }
    auto args = low_latency_args(options, Part::send);
    const auto rows = aligned(x);
    set_tokens(args, rows, topk_idx, topk_weights);
    const auto ticket = make_ticket(x);
    args.ticket = mutable_data<int64_t>(ticket);
    C10_CUDA_CHECK(launch_low_latency_dispatch(args, multiprocessors_, enter()));
    return ticket;
  }

  LowLatencyRows low_latency_dispatch_recv(const at::Tensor& ticket, const LowLatencyOptions& options) override {
    const c10::cuda::CUDAGuard guard(device_);
    auto args = low_latency_args(options, Part::receive);
    args.ticket = const_cast<int64_t*>(data<int64_t>(ticket));
    auto result = low_latency_results(args, options, ticket.options());
    C10_CUDA_CHECK(launch_low_latency_dispatch(args, multiprocessors_, enter()));
    return result;
  }

  std::tuple<at::Tensor, at::Tensor> low_latency_combine(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) override {
    const c10::cuda::CUDAGuard guard(device_);
    auto args = low_latency_args(y.size(2), y.scalar_type(), topk_idx, num_experts, Part::both);
    const auto rows = aligned(y);
    set_results(args, rows, row_weights, recv_row);
    const auto result = low_latency_sums(args, y.size(2), y.options());
    C10_CUDA_CHECK(launch_low_latency_combine(args, multiprocessors_, enter()));
    return result;
  }

  at::Tensor low_latency_combine_send(
      const at::Tensor& y,
      const at::Tensor& topk_idx,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row,
      int64_t num_experts) override {
    const c10::cuda::CUDAGuard guard(device_);
    auto args = low_latency_args(y.size(2), y.scalar_type(), topk_idx, num_experts, Part::send);
    const auto rows = aligned(y);
    set_results(args, rows, row_weights, recv_row);
    const auto ticket = make_ticket(y);
    args.ticket = mutable_data<int64_t>(ticket);
    C10_CUDA_CHECK(launch_low_latency_combine(args, multiprocessors_, enter()));
    return ticket;
  }

  std::tuple<at::Tensor, at::Tensor> low_latency_combine_recv(
      const at::Tensor& ticket,
      const at::Tensor& topk_idx,
      int64_t hidden,
      at::ScalarType dtype,
      int64_t num_experts) override {
    const c10::cuda::CUDAGuard guard(device_);
    auto args = low_latency_args(hidden, dtype, topk_idx, num_experts, Part::receive);
    args.ticket = const_cast<int64_t*>(data<int64_t>(ticket));
    const auto result = low_latency_sums(args, hidden, ticket.options().dtype(dtype));
    C10_CUDA_CHECK(launch_low_latency_combine(args, multiprocessors_, enter()));
    return result;
  }

  bool takes(const at::Tensor& t) const override { return t.is_cuda() && t.get_device() == device_; }
  int64_t world_size() const override { return layout_.world_size; }

  int64_t settle() override {
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    State state{};
    C10_CUDA_CHECK(cudaMemcpy(&state, comm_.state, sizeof(state), cudaMemcpyDeviceToHost));
    uint64_t epoch = state.epoch;
    for (const auto& kind : state.low_latency) {
      epoch = std::max(epoch, kind.sent);
    }
    return static_cast<int64_t>(epoch);
  }

  void restart(int64_t epoch) override {
    const c10::cuda::CUDAGuard guard(device_);
    State state{};
    state.epoch = static_cast<uint64_t>(epoch);
    for (auto& kind : state.low_latency) {
      kind.sent = kind.received = static_cast<uint64_t>(epoch);
    }
    C10_CUDA_CHECK(cudaMemcpy(comm_.state, &state, sizeof(state), cudaMemcpyHostToDevice));
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    *mailbox_ = {};
    fatal_.clear();
    masked_ = 0;
  }

  int64_t masked() const override {
    uint32_t words[2] = {};
    const Stream stream;
    for (int i = 0; i < 2; ++i) {
      const uint32_t* from = i == 0 ? &comm_.state->masked_by_host : &comm_.state->masked_by_timeout;
      stream.copy(&words[i], from, sizeof(uint32_t));
    }
    return words[0] | words[1];
  }

  void mask(int64_t ranks) override {
    masked_ |= static_cast<uint32_t>(ranks);
    Stream().copy(&comm_.state->masked_by_host, &masked_, sizeof(masked_));
  }

  bool is_idle() const override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto status = last_stream_ ? cudaStreamQuery(*last_stream_) : cudaSuccess;
    if (status != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
    }
    return status == cudaSuccess;
  }

 private:
  // --- exchanges ---

  // Before every operator. Exchanges of one communicator follow each other also from stream to stream.
  c10::cuda::CUDAStream enter() {
    throw_failure();
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (!is_capturing()) {
      if (last_stream_ && *last_stream_ != stream) {
        cudaEvent_t event = nullptr;
        C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        C10_CUDA_CHECK(cudaEventRecord(event, *last_stream_));
        C10_CUDA_CHECK(cudaStreamWaitEvent(stream, event));
        C10_CUDA_CHECK(cudaEventDestroy(event));
      }
      last_stream_ = stream;
    }
    return stream;
  }

  PlanView view_of(const PlanTensors& plan) const {
    PlanView view{};
    view.send_slot = data<int32_t>(plan.send_slot);
    view.send_counts = data<int32_t>(plan.send_counts);
    view.recv_counts = data<int32_t>(plan.recv_counts);
    view.expert_major = plan.expert_major;
    if (plan.expert_major) {
      view.recv_slot = data<int32_t>(plan.recv_map);
    } else {
      view.recv_topk_idx = plan.recv_map.const_data_ptr();
      view.wide_idx = plan.recv_map.scalar_type() == at::kLong;
    }
    view.num_tokens = static_cast<int>(plan.send_slot.size(0));
    view.num_topk = static_cast<int>(plan.send_slot.size(1));
    view.rows = plan.recv_map.size(0);
    return view;
  }

  static void set_agreed(
      int64_t (&agreed)[kNumAgreed],
      const at::Tensor& rows,
      const std::optional<at::Tensor>& topk_weights,
      const std::optional<at::Tensor>& scales,
      int64_t num_topk) {
    agreed[0] = rows.size(1);
    agreed[1] = static_cast<int64_t>(rows.scalar_type());
    agreed[2] = element_bytes(topk_weights) * num_topk;
    agreed[3] = bytes_per_row(scales);
  }

  int64_t record_limit() const { return std::min<int64_t>(layout_.slot_bytes, max_record_bytes()); }

  static int64_t record_tail(Record record, int64_t num_topk) {
    record.row_bytes = 0;
    return record.bytes(static_cast<int>(num_topk));
  }

  // One exchange for each slice of columns that a slot has room for; the first takes what travels along.
  template <class Args, class Launch>
  void by_columns(Args& args, int64_t row_bytes, int64_t num_topk, Launch launch) const {
    args.record.row_stride = row_bytes;
    const int64_t widest = (record_limit() - record_tail(args.record, num_topk)) / kVector * kVector;
    for (int64_t begin = 0; begin < row_bytes; begin += widest) {
      args.record.row_bytes = static_cast<int>(std::min(widest, row_bytes - begin));
      launch(begin);
      args.record.weight_bytes = args.record.scale_bytes = 0;
    }
  }

  at::Tensor dispatch_rows(DispatchArgs& args, const at::Tensor& x, int64_t rows, cudaStream_t stream) const {
    const auto wire = to_wire(x);
    const auto result = wire_result(x, rows, wire.size(1));
    by_columns(args, wire.size(1), args.plan.num_topk, [&](int64_t begin) {
      args.x = data<char>(wire) + begin;
      args.out = mutable_data<char>(result) + begin;
      C10_CUDA_CHECK(launch_dispatch(args, stream));
    });
    return from_wire(result, x);
  }

  at::Tensor combine_rows(CombineArgs& args, const at::Tensor& y, int64_t num_tokens, cudaStream_t stream) const {
    const auto wire = to_wire(y);
    const auto result = wire_result(y, num_tokens, wire.size(1));
    args.element = element_of(y.scalar_type());
    by_columns(args, wire.size(1), args.plan.num_topk, [&](int64_t begin) {
      args.y = data<char>(wire) + begin;
      args.out = mutable_data<char>(result) + begin;
      C10_CUDA_CHECK(launch_combine(args, stream));
    });
    return from_wire(result, y);
  }

  // --- the low-latency pair ---

  // Rows as the kernels take them, from an address that is a multiple of 16.
  static at::Tensor aligned(const at::Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kVector == 0 ? t : t.clone();
  }

  at::Tensor make_ticket(const at::Tensor& like) const {
    return at::empty({2, layout_.world_size}, like.options().dtype(at::kLong));
  }

  void check_low_latency(OpKind op, int64_t num_topk, int64_t num_experts, int64_t hidden, int64_t row_bytes) const {
    TORCH_CHECK(
        low_latency_.max_tokens > 0,
        name_of(op),
        ": expected low_latency_tokens of torch_ep.init to be given, on transport nvlink, got None");
    check_limit(op, "num_topk", max_topk_, num_topk);
    check_limit(op, "num_experts", max_experts_, num_experts);
    check_limit(op, "hidden", max_hidden_, hidden);
    TORCH_CHECK_VALUE(
        row_bytes % kVector == 0,
        name_of(op),
        ": expected rows of a multiple of ",
        kVector,
        " bytes on transport nvlink, got ",
        row_bytes);
  }

  void check_record(OpKind op, int64_t bytes) const {
    const int64_t most = std::min<int64_t>(low_latency_.slot_bytes, max_record_bytes());
    TORCH_CHECK_VALUE(
        bytes <= most,
        name_of(op),
        ": expected rows of at most ",
        most,
        " bytes with what travels along, for which torch_ep.init made room, got ",
        bytes);
  }

  LowLatencyDispatchArgs low_latency_args(const LowLatencyOptions& options, Part part) const {
    constexpr auto kOp = OpKind::low_latency_dispatch;
    LowLatencyDispatchArgs args{};
    args.comm = comm_;
    args.part = part;
    args.element = element_of(options.dtype);
    args.quantize = static_cast<cuda::Quantize>(options.quantize);
    args.max_tokens = static_cast<int>(options.max_tokens_per_rank);
    args.num_topk = static_cast<int>(options.num_topk);
    args.num_experts = static_cast<int>(options.num_experts);
    args.hidden = static_cast<int>(options.hidden);
    const auto groups = static_cast<int>((options.hidden + 127) / 128);
    if (options.quantize == ep::Quantize::none) {
      args.row_bytes = args.hidden * static_cast<int>(c10::elementSize(options.dtype));
    } else {
      args.row_bytes = args.hidden;
      args.num_scales = options.quantize == ep::Quantize::fp8_ue8m0 ? (groups + 3) / 4 : groups;
    }
    check_low_latency(kOp, options.num_topk, options.num_experts, options.hidden, args.row_bytes);
    check_limit(kOp, "low_latency_tokens", low_latency_.max_tokens, options.max_tokens_per_rank);
    check_record(kOp, args.record_bytes());
    return args;
  }

  static void set_tokens(
      LowLatencyDispatchArgs& args,
      const at::Tensor& x,
      const at::Tensor& topk_idx,
      const std::optional<at::Tensor>& topk_weights) {
    args.x = data<char>(x.view(at::kByte));
    args.topk_idx = topk_idx.const_data_ptr();
    args.wide_idx = topk_idx.scalar_type() == at::kLong;
    args.topk_weights = topk_weights ? data<float>(*topk_weights) : nullptr;
    args.num_tokens = x.size(0) <= args.max_tokens ? static_cast<int>(x.size(0)) : 0;
  }

  // After an exchange without any, so that nobody waits for this rank in vain.
  static void check_tokens(int64_t num_tokens, const LowLatencyOptions& options) {
    TORCH_CHECK_VALUE(
        num_tokens <= options.max_tokens_per_rank,
        name_of(OpKind::low_latency_dispatch),
        ": expected at most max_tokens_per_rank = ",
        options.max_tokens_per_rank,
        " tokens, got ",
        num_tokens);
  }

  LowLatencyRows low_latency_results(
      LowLatencyDispatchArgs& args,
      const LowLatencyOptions& options,
      const at::TensorOptions& on) const {
    const int64_t world_size = layout_.world_size, num_local = options.num_experts / world_size;
    const int64_t room = world_size * options.max_tokens_per_rank;
    const bool quantised = options.quantize != ep::Quantize::none;
    const auto ints = on.dtype(at::kInt);
    const auto rows =
        at::empty({num_local, room, options.hidden}, on.dtype(quantised ? at::kFloat8_e4m3fn : options.dtype));
    std::optional<at::Tensor> scales;
    if (quantised) {
      args.scale_rows = round_up(room, 4);
      scales = at::empty_strided(
          {num_local, room, args.num_scales},
          {args.num_scales * args.scale_rows, 1, args.scale_rows},
          on.dtype(options.quantize == ep::Quantize::fp8_ue8m0 ? at::kInt : at::kFloat));
      args.scales = scales->mutable_data_ptr();
    }
    const auto tokens_per_expert = at::empty({num_local}, ints);
    const auto source_offsets = at::empty({num_local, world_size}, ints);
    // A rank that is masked in the middle of an exchange leaves holes in it.
    const auto recv_slot = comm_.masks ? at::full({num_local, room}, -1, ints) : at::empty({num_local, room}, ints);
    const auto recv_row = at::empty({room, options.num_topk}, ints);
    const auto row_weights = at::empty({num_local, room}, on.dtype(at::kFloat));
    const auto wait_ns = at::empty({world_size}, on.dtype(at::kLong));
    args.rows = static_cast<char*>(rows.mutable_data_ptr());
    args.tokens_per_expert = mutable_data<int32_t>(tokens_per_expert);
    args.source_offsets = mutable_data<int32_t>(source_offsets);
    args.recv_slot = mutable_data<int32_t>(recv_slot);
    args.recv_row = mutable_data<int32_t>(recv_row);
    args.row_weights = mutable_data<float>(row_weights);
    args.wait_ns = mutable_data<int64_t>(wait_ns);
    return {rows, scales, tokens_per_expert, source_offsets, recv_slot, recv_row, row_weights, wait_ns};
  }

  LowLatencyCombineArgs low_latency_args(
      int64_t hidden,
      at::ScalarType dtype,
      const at::Tensor& topk_idx,
      int64_t num_experts,
      Part part) const {
    constexpr auto kOp = OpKind::low_latency_combine;
    LowLatencyCombineArgs args{};
    args.comm = comm_;
    args.part = part;
    args.topk_idx = topk_idx.const_data_ptr();
    args.wide_idx = topk_idx.scalar_type() == at::kLong;
    args.num_tokens = static_cast<int>(topk_idx.size(0));
    args.element = element_of(dtype);
    args.num_topk = static_cast<int>(topk_idx.size(1));
    args.num_experts = static_cast<int>(num_experts);
    args.row_bytes = static_cast<int>(hidden * static_cast<int64_t>(c10::elementSize(dtype)));
    check_low_latency(kOp, args.num_topk, num_experts, hidden, args.row_bytes);
    check_limit(kOp, "low_latency_tokens", low_latency_.max_tokens, args.num_tokens);
    check_record(kOp, args.row_bytes);
    return args;
  }

  void set_results(
      LowLatencyCombineArgs& args,
      const at::Tensor& y,
      const at::Tensor& row_weights,
      const at::Tensor& recv_row) const {
    args.y = static_cast<const char*>(y.const_data_ptr());
    args.row_weights = data<float>(row_weights);
    args.recv_row = data<int32_t>(recv_row);
    args.max_tokens = static_cast<int>(recv_row.size(0) / layout_.world_size);
    check_limit(OpKind::low_latency_combine, "low_latency_tokens", low_latency_.max_tokens, args.max_tokens);
  }

  std::tuple<at::Tensor, at::Tensor>
  low_latency_sums(LowLatencyCombineArgs& args, int64_t hidden, const at::TensorOptions& on) const {
    const auto out = at::empty({args.num_tokens, hidden}, on);
    const auto wait_ns = at::empty({layout_.world_size}, on.dtype(at::kLong));
    args.out = static_cast<char*>(out.mutable_data_ptr());
    args.wait_ns = mutable_data<int64_t>(wait_ns);
    return {out, wait_ns};
  }

  // --- the exact plan ---

  // The one number that an exact plan waits for.
  int64_t await_rows(cudaStream_t stream) {
    // The kernel's own waits end by the time-out; this one is for a kernel that ended without a word, or never began.
    const auto look_at = std::chrono::milliseconds(10);
    auto look = steady_clock::now() + look_at;
    std::atomic_ref<uint64_t> told(mailbox_->plan_epoch);
    while (told.load(std::memory_order_acquire) == 0) {
      if (steady_clock::now() < look) {
        continue;
      }
      look += look_at;
      const auto status = cudaStreamQuery(stream);
      if (status != cudaErrorNotReady) {
        C10_CUDA_CHECK(status);
        TORCH_CHECK(told.load(std::memory_order_acquire) != 0, "ep::plan: the kernel ended without a result");
      }
      std::this_thread::yield();
    }
    if (mailbox_->plan_failed != 0) {
      C10_CUDA_CHECK(cudaStreamSynchronize(stream));
      throw_failure();
      TORCH_CHECK(false, "ep::plan: the kernel reported a failure without a record");
    }
    return mailbox_->rows;
  }

  // --- errors ---

  std::string refusal(int64_t num_tokens, int64_t most) const {
    std::ostringstream message;
    message << "ep::plan: expected at most max_tokens_per_rank = " << most << " tokens, got " << num_tokens;
    return message.str();
  }

  // Throws what a kernel reported since the last call. After a time-out every call throws, until a reset.
  void throw_failure() {
    if (!fatal_.empty()) {
      C10_THROW_ERROR(DistError, fatal_);
    }
    const int64_t stopped = std::atomic_ref<int64_t>(mailbox_->stopped).load(std::memory_order_acquire);
    const auto kind = static_cast<Failure>(std::atomic_ref<int64_t>(mailbox_->kind).load(std::memory_order_acquire));
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
    const Mailbox report = *mailbox_;
    if (kind == Failure::timeout || kind == Failure::left || kind == Failure::bad_order) {
      fatal_ = kind == Failure::bad_order ? describe_order(report) : describe_absence(report, kind);
      C10_THROW_ERROR(DistError, fatal_);
    }
    std::atomic_ref<int64_t>(mailbox_->kind).store(0, std::memory_order_release);
    if (kind == Failure::mismatch) {
      C10_THROW_ERROR(DistError, describe_mismatch(report));
    }
    if (kind == Failure::elsewhere) {
      std::ostringstream message;
      message << op_name(report.op) << ": rank " << report.peer << " disagrees with another rank in exchange "
              << report.epoch << " of group '" << group_name_ << "', whose errors say on what";
      C10_THROW_ERROR(DistError, message.str());
    }
    const auto cause = kind == Failure::bad_topk ? describe_topk(report) : describe_plan(report);
    if (kind == Failure::bad_topk && report.peer != comm_.rank) {
      std::ostringstream message;
      message << "ep::plan: rank " << report.peer << " failed before exchange " << report.epoch << ": " << cause;
      C10_THROW_ERROR(DistError, message.str());
    }
    TORCH_CHECK_VALUE(false, cause);
  }

  static const char* op_name(int64_t op) { return name_of(static_cast<OpKind>(op)); }

  std::string describe_topk(const Mailbox& report) const {
    if (report.ours == kTooManyTokens) {
      return report.peer == comm_.rank ? refusal(last_tokens_, last_most_tokens_)
                                       : "ep::plan: expected at most max_tokens_per_rank tokens, got more";
    }
    std::ostringstream message;
    const int64_t num_topk = report.theirs_epoch >> 32, num_experts = report.theirs_epoch & 0xffffffff;
    const int64_t token = report.detail / num_topk, slot = report.detail % num_topk;
    if (report.ours == kOutOfRange) {
      message << op_name(report.op) << ": expected topk_idx in [-1, " << num_experts << "), got " << report.theirs
              << " at token " << token << ", slot " << slot;
    } else {
      message << op_name(report.op) << ": expected different experts in one token, got expert " << report.theirs
              << " at token " << token << ", slots " << report.ours << " and " << slot;
    }
    return message.str();
  }

  std::string describe_plan(const Mailbox& report) const {
    static constexpr const char* kNames[] = {"send_slot", "recv_slot"};
    std::ostringstream message;
    message << op_name(report.op) << ": expected " << kNames[report.detail] << " of this plan in [-1, " << report.ours
            << "), in the order of ep::plan, got " << report.theirs << " (exchange " << report.epoch << ")";
    return message.str();
  }

  std::string describe_mismatch(const Mailbox& report) const {
    std::ostringstream message;
    const auto op = static_cast<OpKind>(report.op);
    message << name_of(op) << ": ";
    if (report.detail == 0) {
      message << "ranks issued different sequences of operators on group '" << group_name_ << "': rank " << comm_.rank
              << " is in " << name_of(op) << " (exchange " << report.epoch << "), rank " << report.peer << " in "
              << op_name(report.theirs) << " (exchange " << report.theirs_epoch << ")";
    } else if (op == OpKind::low_latency_dispatch || op == OpKind::low_latency_combine) {
      static constexpr const char* kNames[] = {"num_topk of num_experts", "hidden", "max_tokens_per_rank", "dtype"};
      const bool of_rows = op == OpKind::low_latency_combine;
      const auto show = [&](int64_t value) -> std::string {
        static constexpr const char* kElements[] = {"Double", "Float", "BFloat16", "Half"};
        static constexpr const char* kQuantize[] = {"", " as fp8", " as fp8_pow2", " as fp8_ue8m0"};
        const int64_t high = value >> 32, low = value & 0xffffffff;
        if (of_rows) {
          return std::to_string((value & 0x3fff) * kVector) + " of " + kElements[value >> 14 & 3];
        }
        switch (report.detail) {
          case 1:
            return std::to_string(high) + " of " + std::to_string(low);
          case kNumAgreed:
            return std::string(kElements[high % 4]) + kQuantize[low % 4];
          default:
            return std::to_string(value);
        }
      };
      message << "expected the same " << (of_rows ? "bytes of a row" : kNames[report.detail - 1])
              << " on every rank, got " << show(report.ours) << " on rank " << comm_.rank << " and "
              << show(report.theirs) << " on rank " << report.peer;
    } else if (report.detail <= kNumAgreed) {
      static constexpr const char* kPlanNames[] = {"num_experts", "num_topk", "", ""};
      static constexpr const char* kMoveNames[] = {
          "hidden", "dtype", "bytes of topk_weights a token", "bytes of scales a token"};
      const bool is_dtype = op != OpKind::plan && report.detail == 2;
      const auto show = [&](int64_t value) {
        return is_dtype ? std::string(c10::toString(static_cast<at::ScalarType>(value))) : std::to_string(value);
      };
      message << "expected the same " << (op == OpKind::plan ? kPlanNames : kMoveNames)[report.detail - 1]
              << " on every rank, got " << show(report.ours) << " on rank " << comm_.rank << " and "
              << show(report.theirs) << " on rank " << report.peer;
    } else {
      const bool outward = report.detail == kNumAgreed + 1;
      const int64_t from = outward ? comm_.rank : report.peer, to = outward ? report.peer : comm_.rank;
      message << "expected the same plan on every rank, got one by which " << (outward ? report.theirs : report.ours)
              << " rows go from rank " << from << " to rank " << to << ", where rank " << from << " sends "
              << (outward ? report.ours : report.theirs);
    }
    return message.str();
  }

  // Ranks of which this one saw no header of the exchange; of a low-latency combine, which has none, nobody knows.
  std::vector<int> absent(const Mailbox& report) const {
    const auto epoch = static_cast<uint64_t>(report.epoch);
    const auto op = static_cast<OpKind>(report.op);
    std::vector<int> ranks;
    if (op == OpKind::low_latency_combine) {
      return ranks;
    }
    const Stream stream;
    for (int r = 0; r < layout_.world_size; ++r) {
      const auto half = static_cast<int>(epoch % 2);
      const int64_t at = op == OpKind::low_latency_dispatch ? low_latency_.header(half, r) : layout_.header(half, r);
      Header header{};
      stream.copy(&header, comm_.buffers[comm_.rank] + at, sizeof(header));
      if (r != comm_.rank && header.epoch < epoch) {
        ranks.push_back(r);
      }
    }
    return ranks;
  }

  std::string describe_order(const Mailbox& report) const {
    std::ostringstream message;
    message << op_name(report.op) << ": expected exchange " << report.ours << " of group '" << group_name_
            << "' to be received next, got the ticket of exchange " << report.theirs
            << ": exchanges are received in the order in which they were sent, each once. torch_ep.reset(group) on "
               "every rank makes the group usable again";
    return message.str();
  }

  std::string describe_absence(const Mailbox& report, Failure kind) const {
    static constexpr const char* kPhases[] = {"headers", "the buffer", "counts", "rows", "its own blocks"};
    std::ostringstream message;
    message << op_name(report.op) << ": rank " << comm_.rank << " waited in exchange " << report.epoch << " of group '"
            << group_name_ << "' (" << kPhases[report.phase] << ", time-out " << timeout_.count() << " ms) for ";
    // Who waits for a credit has entered no exchange that peers could have seen.
    auto late = static_cast<Phase>(report.phase) == Phase::credit ? std::vector<int>() : absent(report);
    const auto missing = static_cast<int>(kind == Failure::left ? report.detail : report.peer);
    if (kind == Failure::timeout && missing == comm_.rank && static_cast<Phase>(report.phase) == Phase::credit) {
      message << "itself: two exchanges were sent and not received, and there is no room for a third";
      return message.str();
    }
    if (late.empty() && missing == comm_.rank) {
      message << "rank " << report.peer << ", which gave up this exchange: rank " << comm_.rank << " came too late";
    } else {
      if (late.empty()) {
        late.push_back(missing);
      }
      message << (late.size() == 1 ? "rank " : "ranks ");
      for (size_t i = 0; i < late.size(); ++i) {
        message << (i ? ", " : "") << late[i];
      }
      message << ", not heard of since: dead, stalled, or running something else";
    }
    message << ". If every rank is alive, torch_ep.reset(group) on all of them makes the group usable again";
    return message.str();
  }

  const std::string group_name_;
  const Layout layout_;
  const LowLatencyLayout low_latency_;
  const int64_t max_tokens_, max_hidden_, max_topk_, max_experts_;
  const std::chrono::milliseconds timeout_;
  const c10::DeviceIndex device_;
  const int multiprocessors_;
  at::Tensor state_, rows_of_;
  Mailbox* mailbox_ = nullptr;
  Comm comm_;
  std::optional<c10::cuda::CUDAStream> last_stream_;
  uint32_t masked_ = 0;  // State::masked_by_host
  // Of the last plan, whose exact form says at once if these were too many.
  int64_t last_tokens_ = 0, last_most_tokens_ = 0;
  std::string fatal_;
};

}  // namespace

bool kernels_run() {
  const bool run = prepare_kernels() == cudaSuccess;
  if (!run) {
    static_cast<void>(cudaGetLastError());
  }
  return run;
}

std::shared_ptr<Transport> make_nvlink(const NvlinkOptions& options) {
  return std::make_shared<Nvlink>(options);
}

}  // namespace ep::cuda
