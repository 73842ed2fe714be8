// Several ranks of the nvlink kernels on one GPU, all in one launch. Some tools of compute-sanitizer run kernels one
// after another: ranks with kernels of their own would wait for each other forever.
//
//   nvcc -arch=sm_90a -std=c++20 -O3 -lineinfo -Xcompiler -ffp-contract=off virtual_ranks.cu -o virtual_ranks
//   compute-sanitizer --tool memcheck --error-exitcode 1 ./virtual_ranks --cases 24
//
// Random problems go through plan, dispatch and combine. Results are compared bit by bit with those that the host
// computes below, as torch_ep/reference.py does. Their memory is not initialized before, for initcheck. Before 2025.4
// initcheck does not see what bulk copies write (release notes): --fill initializes that memory, and nothing else.
#include "common.cuh"

// The kernels' bodies, which use only blockIdx.x and gridDim.x: here blockIdx.y is the rank. Each file has a namespace
// of its own, since some names occur in several files.
namespace plan_file {
using namespace ::ep;
using namespace ::ep::nvlink;
#include "nvlink/kernels/plan.cu"

namespace ep::nvlink {

__global__ void __launch_bounds__(kThreads, 1)
    virtual_plan(const PlanArgs* ranks, const __grid_constant__ PlanShape shape) {
  extern __shared__ int words[];
  __shared__ PlanShared shared;
  PlanBlock(ranks[blockIdx.y], shape, shared, words).run();
}

cudaError_t launch_virtual(const std::vector<PlanArgs>& ranks, const PlanArgs* on_device) {
  const PlanArgs& args = ranks[0];
  const auto shared = static_cast<int>(plan_shared_bytes(args.num_experts, args.comm.layout.world_size));
  const auto error = cudaFuncSetAttribute(virtual_plan, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) {
    return error;
  }
  const dim3 grid(args.comm.layout.num_blocks, static_cast<unsigned>(ranks.size()));
  virtual_plan<<<grid, kThreads, shared>>>(on_device, shape_of(args));
  return cudaGetLastError();
}

}  // namespace ep::nvlink
}  // namespace plan_file

namespace dispatch_file {
using namespace ::ep;
using namespace ::ep::nvlink;
#include "nvlink/kernels/dispatch.cu"

namespace ep::nvlink {

__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    virtual_dispatch(const DispatchArgs* ranks, const __grid_constant__ DispatchShape shape) {
  Dispatch(ranks[blockIdx.y], shape).run();
}

cudaError_t launch_virtual(const std::vector<DispatchArgs>& ranks, const DispatchArgs* on_device) {
  const DispatchArgs& args = ranks[0];
  const DispatchShape shape = shape_of(args);
  const int shared = shape.warps * shape.stages * (shape.stage_bytes + static_cast<int>(sizeof(uint64_t)));
  const auto error = cudaFuncSetAttribute(virtual_dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) {
    return error;
  }
  const dim3 grid(args.comm.layout.num_blocks, static_cast<unsigned>(ranks.size()));
  virtual_dispatch<<<grid, shape.warps * kWarp, shared>>>(on_device, shape);
  return cudaGetLastError();
}

}  // namespace ep::nvlink
}  // namespace dispatch_file

namespace combine_file {
using namespace ::ep;
using namespace ::ep::nvlink;
#include "nvlink/kernels/combine.cu"

namespace ep::nvlink {

template <class T, bool weighted>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) virtual_combine(const CombineArgs* ranks, int send_blocks) {
  Combine<T, weighted>(ranks[blockIdx.y], send_blocks).run();
}

template <class T, bool weighted>
cudaError_t launch_virtual(const std::vector<CombineArgs>& ranks, const CombineArgs* on_device) {
  const CombineArgs& args = ranks[0];
  constexpr int shared = kMaxWarps * (kWarpBytes + 2 * static_cast<int>(sizeof(uint64_t)));
  const auto kernel = virtual_combine<T, weighted>;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) {
    return error;
  }
  const dim3 grid(args.comm.layout.num_blocks, static_cast<unsigned>(ranks.size()));
  kernel<<<grid, kMaxWarps * kWarp, shared>>>(on_device, send_blocks_of(args));
  return cudaGetLastError();
}

}  // namespace ep::nvlink
}  // namespace combine_file

namespace {

// --- ranks ---

constexpr int kMostTokens = 640;  // more than one round of ep::plan, also with two blocks
constexpr int kMostLocalExperts = 9;
constexpr int64_t kWireRowBytes = 10240;
constexpr int64_t kShortTimeoutNs = 3'000'000'000;  // of an exchange that is to time out

class World {
 public:
  World(int world_size, int num_blocks, int64_t wire_row_bytes = kWireRowBytes)
      : layout_{world_size, num_blocks, kMaxTopk, kMostLocalExperts * world_size, kMostTokens, wire_row_bytes} {
    for (int r = 0; r < world_size; ++r) {
      Comm comm{};
      comm.state = memory_.zeros<State>(1);
      comm.rows_of = memory_.zeros<uint64_t>(size_t{1} * world_size * kMostTokens * kMaxTopk);
      comm.layout = layout_;
      comm.rank = r;
      comm.timeout_ns = default_timeout_ns();
      void* host_report = nullptr;
      check(cudaHostAlloc(&host_report, sizeof(HostReport), cudaHostAllocPortable | cudaHostAllocMapped));
      std::memset(host_report, 0, sizeof(HostReport));
      comm.host_report = static_cast<HostReport*>(host_report);
      comms_.push_back(comm);
    }
    for (int r = 0; r < world_size; ++r) {
      char* buffer = memory_.zeros<char>(layout_.bytes());
      for (Comm& comm : comms_) {
        comm.buffers[r] = buffer;
      }
    }
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() {
    for (const Comm& comm : comms_) {
      check(cudaFreeHost(comm.host_report));
    }
  }

  int num_blocks() const { return layout_.num_blocks; }
  const Comm& comm(int rank) const { return comms_[rank]; }
  void count_exchange() { ++epoch_; }

  // Waits for all kernels. None may have failed.
  void settle() const {
    check(cudaDeviceSynchronize());
    for (const Comm& comm : comms_) {
      if (comm.host_report->failure.kind != Failure::none) {
        fail(failure_of(comm));
      }
      const uint64_t epoch = fetch(&comm.state->epoch, 1)[0];
      if (epoch != epoch_) {
        fail(
            "rank " + std::to_string(comm.rank) + " ended exchange " + std::to_string(epoch) + ", expected " +
            std::to_string(epoch_));
      }
    }
  }

 private:
  const Layout layout_;
  Memory memory_;
  vector<Comm> comms_;
  uint64_t epoch_ = 0;
};

// --- problems ---

enum class Routing { random, holes, one_expert, one_rank, own_rank, none, few_tokens };
enum class Capacity { exact, fits, too_small, zero, tail };
constexpr const char* kRoutings[] = {"random", "holes", "one-expert", "one-rank", "own-rank", "none", "few-tokens"};
constexpr const char* kCapacities[] = {"exact", "fits", "too-small", "zero", "tail"};
constexpr const char* kElements[] = {"f64", "f32", "bf16", "f16"};

struct Case {
  vector<int> tokens;  // of each rank
  int num_topk = 1, num_local = 1;
  Routing routing = Routing::random;
  bool expert_major = false, wide_idx = false;
  Capacity capacity = Capacity::exact;
  int alignment = 1;
  Element element = Element::f32;
  int row_bytes = 16;
  int first_bytes = 16;  // columns that the first exchange takes, the rest goes in a second one
  int weight_bytes = 0, scale_bytes = 0;

  int world_size() const { return static_cast<int>(tokens.size()); }
  int num_experts() const { return num_local * world_size(); }
  int most_tokens() const { return *std::max_element(tokens.begin(), tokens.end()); }
};

std::string describe(const Case& c, int num_blocks) {
  std::string text = std::to_string(c.world_size()) + " ranks of " + std::to_string(num_blocks) + " blocks, tokens";
  for (const int n : c.tokens) {
    text += ' ';
    text += std::to_string(n);
  }
  return text + ", top-" + std::to_string(c.num_topk) + " of " + std::to_string(c.num_experts()) + " experts, " +
         kRoutings[static_cast<int>(c.routing)] + ", " + (c.expert_major ? "expert_major" : "rank_major") +
         (c.wide_idx ? ", int64, " : ", int32, ") + kCapacities[static_cast<int>(c.capacity)] + ", alignment " +
         std::to_string(c.alignment) + ", rows of " + std::to_string(c.row_bytes) + " B " +
         kElements[static_cast<int>(c.element)] + " from " + std::to_string(c.first_bytes) + ", weights " +
         std::to_string(c.weight_bytes) + " B, scales " + std::to_string(c.scale_bytes) + " B";
}

Case draw(Random& r, int world_size) {
  Case c;
  const bool wide = r.below(4) == 0;
  const int most = wide ? 6 : r.pick({1, 5, 13, 40});
  for (int i = 0; i < world_size; ++i) {
    c.tokens.push_back(r.below(4) == 0 ? 0 : r.below(most + 1));
  }
  c.num_topk = r.pick({1, 2, 3, 8, 9, 32});
  c.num_local = r.pick({1, 2, 3, 5, kMostLocalExperts});
  c.routing = static_cast<Routing>(r.below(7));
  c.expert_major = r.below(2) != 0;
  c.wide_idx = r.below(2) != 0;
  c.capacity = static_cast<Capacity>(r.below(5));
  c.alignment = c.expert_major ? r.pick({1, 8, 128}) : 1;
  c.element = static_cast<Element>(r.below(4));
  c.row_bytes = wide ? r.pick({2064, 7168, 7184, 9728}) : r.pick({16, 48, 112, 1040});
  c.first_bytes = c.row_bytes > 16 && r.below(3) == 0 ? c.row_bytes / 32 * 16 : c.row_bytes;
  c.weight_bytes = r.pick({0, 2, 4, 8});
  c.scale_bytes = r.pick({0, 1, 12, 16, 20, 56, 224});
  return c;
}

// [token][slot] of a rank: different experts, or -1.
vector<int> draw_topk(Random& r, const Case& c, int rank, int chosen) {
  const int num_experts = c.num_experts();
  int from = 0, to = num_experts;
  if (c.routing == Routing::own_rank || c.routing == Routing::one_rank) {
    from = (c.routing == Routing::own_rank ? rank : chosen % c.world_size()) * c.num_local;
    to = from + c.num_local;
  }
  vector<int> result;
  for (int t = 0; t < c.tokens[rank]; ++t) {
    vector<int> slots(std::max(c.num_topk, to - from), -1);
    for (int e = from; e < to; ++e) {
      slots[e - from] = e;
    }
    for (size_t i = slots.size(); i > 1; --i) {
      std::swap(slots[i - 1], slots[r.below(static_cast<int>(i))]);
    }
    slots.resize(c.num_topk);
    const bool visits_nobody = c.routing == Routing::none || (c.routing == Routing::few_tokens && r.below(5) != 0);
    for (int k = 0; k < c.num_topk; ++k) {
      if (c.routing == Routing::one_expert) {
        slots[k] = k == chosen % c.num_topk ? chosen % num_experts : -1;
      } else if (visits_nobody || (c.routing == Routing::holes && r.below(5) < 2)) {
        slots[k] = -1;
      }
    }
    result.insert(result.end(), slots.begin(), slots.end());
  }
  return result;
}

// --- what is expected ---

// The expected plan of a rank.
struct Wanted {
  vector<int32_t> send_row, send_counts, recv_counts, offsets, tokens_per_expert;
  vector<int64_t> map;  // recv_pair, or recv_topk_idx
  int32_t num_dropped = 0;
  int64_t rows = 0;
  // Beside the plan: of each wire row, where it came from; of each of its slots, the row of the result or -1.
  vector<std::pair<int, int>> received;  // (rank, token)
  vector<int64_t> row_of;                // [received][num_topk]
  vector<int> recv_begin;                // of each rank
};

using Topk = vector<vector<int>>;  // of each rank

bool visits(const Case& c, const Topk& topk, int rank, int token, int to) {
  const int* experts = &topk[rank][size_t{1} * token * c.num_topk];
  return std::any_of(experts, experts + c.num_topk, [&](int e) { return e >= 0 && e / c.num_local == to; });
}

Wanted route(const Case& c, const Topk& topk, int rank, int64_t capacity) {
  Wanted w;
  const int num_topk = c.num_topk;
  w.send_row.assign(topk[rank].size(), -1);
  int row = 0;
  for (int to = 0; to < c.world_size(); ++to) {
    const int first = row;
    for (int t = 0; t < c.tokens[rank]; ++t) {
      if (visits(c, topk, rank, t, to)) {
        for (int i = t * num_topk; i < (t + 1) * num_topk; ++i) {
          if (topk[rank][i] >= 0 && topk[rank][i] / c.num_local == to) {
            w.send_row[i] = row;
          }
        }
        ++row;
      }
    }
    w.send_counts.push_back(row - first);
  }
  for (int from = 0; from < c.world_size(); ++from) {
    w.recv_begin.push_back(static_cast<int>(w.received.size()));
    for (int t = 0; t < c.tokens[from]; ++t) {
      if (visits(c, topk, from, t, rank)) {
        w.received.emplace_back(from, t);
      }
    }
    w.recv_counts.push_back(static_cast<int>(w.received.size()) - w.recv_begin[from]);
  }
  const auto num_received = static_cast<int64_t>(w.received.size());
  const auto local_expert = [&](int64_t i, int k) {
    const auto [from, token] = w.received[i];
    const int e = topk[from][token * num_topk + k];
    return e >= 0 && e / c.num_local == rank ? e % c.num_local : -1;
  };
  w.row_of.assign(num_received * num_topk, -1);
  w.tokens_per_expert.assign(c.num_local, 0);
  if (c.expert_major) {
    for (int e = 0; e < c.num_local; ++e) {
      for (int64_t i = 0; i < num_received * num_topk; ++i) {
        if (local_expert(i / num_topk, static_cast<int>(i % num_topk)) == e) {
          const auto place = static_cast<int64_t>(w.map.size());
          w.map.push_back(i);
          if (capacity < 0 || place < capacity) {
            w.row_of[i] = place;
            ++w.tokens_per_expert[e];
          } else {
            ++w.num_dropped;
          }
        }
      }
      w.map.resize(round_up(static_cast<int64_t>(w.map.size()), c.alignment), -1);
      w.offsets.push_back(static_cast<int32_t>(w.map.size()));
    }
    w.rows = capacity < 0 ? static_cast<int64_t>(w.map.size()) : capacity;
    w.map.resize(w.rows, -1);
  } else {
    w.rows = capacity < 0 ? num_received : capacity;
    w.num_dropped = static_cast<int32_t>(std::max<int64_t>(num_received - w.rows, 0));
    w.map.assign(w.rows * num_topk, -1);
    for (int64_t i = 0; i < std::min(num_received, w.rows); ++i) {
      for (int k = 0; k < num_topk; ++k) {
        const int e = local_expert(i, k);
        w.map[i * num_topk + k] = e;
        if (e >= 0) {
          w.row_of[i * num_topk + k] = i;
          ++w.tokens_per_expert[e];
        }
      }
    }
    for (int r = 0; r < c.world_size(); ++r) {
      w.offsets.push_back(w.recv_begin[r] + w.recv_counts[r]);
    }
  }
  for (int32_t& end : w.offsets) {
    end = static_cast<int32_t>(std::min<int64_t>(end, w.rows));
  }
  return w;
}

// Bytes of `size` each, of one row of `from` to one row of `to`.
void copy_row(vector<char>& to, int64_t to_row, const vector<char>& from, int64_t from_row, int size) {
  if (size != 0) {
    std::memcpy(&to[to_row * size], &from[from_row * size], size);
  }
}

// What each row of a rank's result is a copy of: f(row, rank, token, the received wire row, slot or -1: all of them).
template <class F>
void each_copy(const Case& c, const Wanted& w, F f) {
  for (int64_t i = 0; i < static_cast<int64_t>(w.received.size()); ++i) {
    const auto [from, token] = w.received[i];
    if (!c.expert_major) {
      if (i < w.rows) {
        f(i, from, token, -1);
      }
      continue;
    }
    for (int k = 0; k < c.num_topk; ++k) {
      if (w.row_of[i * c.num_topk + k] >= 0) {
        f(w.row_of[i * c.num_topk + k], from, token, k);
      }
    }
  }
}

// The i-th received wire row of `y`, as combine returns it. `weights`: of the rows of y, or empty.
template <class T>
vector<T> reduce_row(
    const Case& c,
    const Wanted& w,
    const vector<T>& y,
    const vector<WideOf<T>>& weights,
    int64_t i,
    int hidden) {
  vector<int64_t> rows;
  if (!c.expert_major) {
    if (i < w.rows) {
      rows.push_back(i);
    }
  } else {
    for (int k = 0; k < c.num_topk; ++k) {
      if (w.row_of[i * c.num_topk + k] >= 0) {
        rows.push_back(w.row_of[i * c.num_topk + k]);
      }
    }
  }
  vector<WideOf<T>> sums(hidden, 0);
  for (size_t n = 0; n < rows.size(); ++n) {
    for (int j = 0; j < hidden; ++j) {
      WideOf<T> term = to_wide(y[rows[n] * hidden + j]);
      if (!weights.empty()) {
        term = weights[rows[n]] * term;
      }
      sums[j] = n == 0 ? term : sums[j] + term;
    }
  }
  vector<T> result;
  for (const auto sum : sums) {
    result.push_back(rounded<T>(sum));
  }
  return result;
}

// --- one case ---

template <class T>
class Run {
 public:
  using Wide = WideOf<T>;

  Run(World& world, const Case& c, Random& random)
      : world_(world), c_(c), random_(random), hidden_(c.row_bytes / static_cast<int>(sizeof(T))) {
    const int chosen = random.below(1 << 20);
    for (int r = 0; r < c.world_size(); ++r) {
      topk_.push_back(draw_topk(random, c, r, chosen));
    }
    int64_t needed = 0;
    for (int r = 0; r < c.world_size(); ++r) {
      needed = std::max(needed, route(c, topk_, r, -1).rows);
    }
    switch (c.capacity) {
      case Capacity::exact:
        break;
      case Capacity::fits:
        capacity_ = needed;
        break;
      case Capacity::too_small:
        capacity_ = needed / 2 / c.alignment * c.alignment;
        break;
      case Capacity::zero:
        capacity_ = 0;
        break;
      case Capacity::tail:
        capacity_ = needed + 3 * c.alignment;
        break;
    }
    for (int r = 0; r < c.world_size(); ++r) {
      wanted_.push_back(route(c, topk_, r, capacity_));
    }
  }

  // Ranks 0 and 1 expect different numbers of rows from each other; all others agree with both. Those two report a
  // mismatch, the others end the exchange too, and the next exchange works.
  void disagree() {
    plan();
    auto counts = fetch(plans_[1].recv_counts, world_size());
    ++counts[0];
    plans_[1].recv_counts = memory_.copy(counts);
    launch(dispatch_of_all(), dispatch_file::ep::nvlink::launch_virtual);
    settle_mismatch();
    combine(draw_rows(), {}, false);
    settle_mismatch();
  }

  // The last rank does not come. All others name it, whichever noticed first, and no later exchange waits.
  void lose() {
    plan();
    auto ranks = dispatch_of_all();
    ranks.pop_back();
    for (DispatchArgs& a : ranks) {
      a.comm.timeout_ns = kShortTimeoutNs;
    }
    for (int i = 0; i < 2; ++i) {
      launch(ranks, dispatch_file::ep::nvlink::launch_virtual);
      check(cudaDeviceSynchronize());
      for (const DispatchArgs& a : ranks) {
        const FailureReport& failure = a.comm.host_report->failure;
        const int missing = failure.kind == Failure::peer_aborted ? failure.missing_rank
                            : failure.kind == Failure::timeout    ? failure.peer
                                                                  : -1;
        if (missing != world_size() - 1 || a.comm.host_report->stopped == 0) {
          fail(
              failure_of(a.comm) + ", so rank " + std::to_string(missing) + " is missing; stopped in exchange " +
              std::to_string(a.comm.host_report->stopped) + ", ended exchange " +
              std::to_string(fetch(&a.comm.state->epoch, 1)[0]) + ", launch " + std::to_string(i));
        }
      }
    }
  }

  void run() {
    plan();
    dispatch();
    // The host does not wait between them.
    const auto y = draw_rows();
    const auto sums = combine(y, {}, true);
    const auto weighted = combine(y, draw_row_weights(), false);
    world_.settle();
    check_combine("combine", y, {}, sums);
    check_combine("weighted combine", y, row_weights_, weighted);
  }

 private:
  int world_size() const { return c_.world_size(); }

  // Rows alone.
  vector<DispatchArgs> dispatch_of_all() {
    vector<DispatchArgs> ranks;
    for (int r = 0; r < world_size(); ++r) {
      DispatchArgs a{};
      a.comm = world_.comm(r);
      a.plan = plans_[r];
      a.format = {c_.row_bytes, c_.row_bytes, 0, 0};
      a.x = memory_.copy(random_.bytes(size_t{1} * c_.tokens[r] * c_.row_bytes));
      a.out = memory_.make_for_bulk(wanted_[r].rows * c_.row_bytes);
      ranks.push_back(a);
    }
    return ranks;
  }

  void settle_mismatch() {
    check(cudaDeviceSynchronize());
    for (int r = 0; r < world_size(); ++r) {
      const Comm& comm = world_.comm(r);
      const auto failure = comm.host_report->failure.kind;
      if (r < 2 ? failure != Failure::mismatch : failure != Failure::none && failure != Failure::mismatch_of_peer) {
        fail(
            "a mismatch of two ranks is failure " + std::to_string(static_cast<int64_t>(failure)) + " on rank " +
            std::to_string(r));
      }
      comm.host_report->failure.kind = Failure::none;
    }
    world_.settle();
  }

  template <class Args, class Launch>
  void launch(const vector<Args>& args, Launch launch_ranks) {
    check(launch_ranks(args, memory_.copy(args)));
    world_.count_exchange();
  }

  template <class Index>
  const void* copy_topk(int rank) {
    return memory_.copy(vector<Index>(topk_[rank].begin(), topk_[rank].end()));
  }

  // --- plan ---

  void plan() {
    vector<PlanArgs> ranks;
    for (int r = 0; r < world_size(); ++r) {
      PlanArgs a{};
      a.comm = world_.comm(r);
      a.handshake.num_experts = c_.num_experts();
      a.handshake.num_topk = c_.num_topk;
      a.comm.host_report->plan = 0;
      a.topk_idx = c_.wide_idx ? copy_topk<int64_t>(r) : copy_topk<int32_t>(r);
      a.wide_idx = c_.wide_idx;
      a.num_tokens = c_.tokens[r];
      a.num_topk = c_.num_topk;
      a.num_experts = c_.num_experts();
      a.expert_major = c_.expert_major;
      a.alignment = c_.alignment;
      a.capacity = capacity_;
      a.map_rows = capacity_;
      if (capacity_ < 0) {
        a.map_rows = int64_t{world_size()} * c_.most_tokens();
        if (c_.expert_major) {
          a.map_rows = a.map_rows * std::min(c_.num_topk, c_.num_local) + c_.num_local * (c_.alignment - 1);
        }
      }
      const bool wide_map = c_.wide_idx && !c_.expert_major;
      const int64_t map_size = a.map_rows * (c_.expert_major ? 1 : c_.num_topk);
      a.send_row = memory_.make<int32_t>(topk_[r].size());
      a.send_counts = memory_.make<int32_t>(world_size());
      a.recv_counts = memory_.make<int32_t>(world_size());
      a.recv_map = wide_map ? static_cast<void*>(memory_.make<int64_t>(map_size)) : memory_.make<int32_t>(map_size);
      a.offsets = memory_.make<int32_t>(wanted_[r].offsets.size());
      a.tokens_per_expert = memory_.make<int32_t>(c_.num_local);
      a.num_dropped = memory_.make<int32_t>(1);
      ranks.push_back(a);
    }
    launch(ranks, plan_file::ep::nvlink::launch_virtual);
    world_.settle();
    for (int r = 0; r < world_size(); ++r) {
      const PlanArgs& a = ranks[r];
      const Wanted& w = wanted_[r];
      if (capacity_ < 0) {
        const uint64_t reply = a.comm.host_report->plan;
        if (reply != (kPlanRowsReady | static_cast<uint64_t>(w.rows))) {
          fail(
              "exact plan of rank " + std::to_string(r) + ": expected " + std::to_string(w.rows) + " rows, got " +
              ((reply & kPlanRowsReady) != 0 ? std::to_string(reply & (kPlanFailed - 1)) : std::string("no number")) +
              ((reply & kPlanFailed) != 0 ? ", failed" : ""));
        }
      }
      expect("send_row", r, fetch(a.send_row, w.send_row.size()), w.send_row);
      expect("send_counts", r, fetch(a.send_counts, w.send_counts.size()), w.send_counts);
      expect("recv_counts", r, fetch(a.recv_counts, w.recv_counts.size()), w.recv_counts);
      expect("offsets", r, fetch(a.offsets, w.offsets.size()), w.offsets);
      expect("tokens_per_expert", r, fetch(a.tokens_per_expert, w.tokens_per_expert.size()), w.tokens_per_expert);
      expect("num_dropped", r, fetch(a.num_dropped, 1), vector<int32_t>{w.num_dropped});
      if (c_.wide_idx && !c_.expert_major) {
        expect("recv_topk_idx", r, fetch(static_cast<const int64_t*>(a.recv_map), w.map.size()), w.map);
      } else {
        const vector<int32_t> map(w.map.begin(), w.map.end());
        expect("recv_map", r, fetch(static_cast<const int32_t*>(a.recv_map), map.size()), map);
      }
      PlanView view{};
      view.send_row = a.send_row;
      view.send_counts = a.send_counts;
      view.recv_counts = a.recv_counts;
      view.recv_pair = c_.expert_major ? static_cast<const int32_t*>(a.recv_map) : nullptr;
      view.recv_topk_idx = c_.expert_major ? nullptr : a.recv_map;
      view.wide_idx = c_.wide_idx;
      view.expert_major = c_.expert_major;
      view.num_tokens = c_.tokens[r];
      view.num_topk = c_.num_topk;
      view.rows = w.rows;
      plans_.push_back(view);
    }
    if (has_differences) {
      fail("a wrong plan is of no use to dispatch and combine");
    }
  }

  // --- dispatch ---

  int64_t weights_of(const Wanted& w) const { return w.rows * (c_.expert_major ? 1 : c_.num_topk); }

  // One exchange for each of a row's two parts; the first takes what travels along. Those of `ranks` are as they would
  // be for a whole row. `shift`: moves them on by some columns.
  template <class Args, class Launch, class Shift>
  void by_columns(vector<Args> ranks, Launch launch_ranks, Shift shift) {
    const int parts[] = {c_.first_bytes, c_.row_bytes - c_.first_bytes};
    for (const int bytes : parts) {
      if (bytes == 0) {
        continue;
      }
      for (Args& a : ranks) {
        a.format.row_bytes = bytes;
      }
      launch(ranks, launch_ranks);
      for (Args& a : ranks) {
        a.format.weight_bytes = a.format.scale_bytes = 0;
        shift(a, bytes);
      }
    }
  }

  void dispatch() {
    vector<vector<char>> x, weights, scales;
    vector<DispatchArgs> ranks;
    for (int r = 0; r < world_size(); ++r) {
      const size_t tokens = c_.tokens[r];
      x.push_back(random_.bytes(tokens * c_.row_bytes));
      weights.push_back(random_.bytes(tokens * c_.num_topk * c_.weight_bytes));
      scales.push_back(random_.bytes(tokens * c_.scale_bytes));
      DispatchArgs a{};
      a.comm = world_.comm(r);
      a.plan = plans_[r];
      a.format = {c_.row_bytes, c_.row_bytes, c_.weight_bytes, c_.scale_bytes};
      a.handshake.hidden = c_.row_bytes;
      a.x = memory_.copy(x[r]);
      a.out = memory_.make_for_bulk(wanted_[r].rows * c_.row_bytes);
      if (c_.weight_bytes != 0) {
        a.weights = memory_.copy(weights[r]);
        a.out_weights = memory_.make<char>(weights_of(wanted_[r]) * c_.weight_bytes);
      }
      if (c_.scale_bytes != 0) {
        a.scales = memory_.copy(scales[r]);
        a.out_scales = memory_.make_for_bulk(wanted_[r].rows * c_.scale_bytes);
      }
      ranks.push_back(a);
    }
    by_columns(ranks, dispatch_file::ep::nvlink::launch_virtual, [](DispatchArgs& a, int bytes) {
      a.x += bytes;
      a.out += bytes;
    });
    world_.settle();
    for (int r = 0; r < world_size(); ++r) {
      const Wanted& w = wanted_[r];
      vector<char> rows(w.rows * c_.row_bytes), row_scales(w.rows * c_.scale_bytes);
      vector<char> row_weights(weights_of(w) * c_.weight_bytes);
      each_copy(c_, w, [&](int64_t row, int from, int64_t token, int slot) {
        copy_row(rows, row, x[from], token, c_.row_bytes);
        copy_row(row_scales, row, scales[from], token, c_.scale_bytes);
        if (slot >= 0) {
          copy_row(row_weights, row, weights[from], token * c_.num_topk + slot, c_.weight_bytes);
          return;
        }
        for (int k = 0; k < c_.num_topk; ++k) {
          if (w.map[row * c_.num_topk + k] >= 0) {
            copy_row(row_weights, row * c_.num_topk + k, weights[from], token * c_.num_topk + k, c_.weight_bytes);
          }
        }
      });
      expect("dispatch: rows", r, fetch(ranks[r].out, rows.size()), rows);
      expect("dispatch: weights", r, fetch(ranks[r].out_weights, row_weights.size()), row_weights);
      expect("dispatch: scales", r, fetch(ranks[r].out_scales, row_scales.size()), row_scales);
    }
  }

  // --- combine ---

  // Whether something was sent to that row of a rank's result.
  bool is_used(int rank, int64_t row) const {
    const Wanted& w = wanted_[rank];
    return c_.expert_major ? w.map[row] >= 0 : row < static_cast<int64_t>(w.received.size());
  }

  // Numbers; no number where nothing was sent, since that must not count.
  vector<vector<T>> draw_rows() {
    vector<vector<T>> result;
    for (int r = 0; r < world_size(); ++r) {
      vector<T> rows;
      for (int64_t i = 0; i < wanted_[r].rows * hidden_; ++i) {
        rows.push_back(
            rounded<T>(is_used(r, i / hidden_) ? random_.number() : std::numeric_limits<double>::quiet_NaN()));
      }
      result.push_back(std::move(rows));
    }
    return result;
  }

  const vector<vector<Wide>>& draw_row_weights() {
    for (int r = 0; r < world_size(); ++r) {
      vector<Wide> weights;
      for (int64_t i = 0; i < wanted_[r].rows; ++i) {
        weights.push_back(
            static_cast<Wide>(is_used(r, i) ? random_.number() : std::numeric_limits<double>::quiet_NaN()));
      }
      row_weights_.push_back(std::move(weights));
    }
    return row_weights_;
  }

  // Returns the arguments, which have the results. `row_weights`: empty for none.
  vector<CombineArgs> combine(const vector<vector<T>>& y, const vector<vector<Wide>>& row_weights, bool with_weights) {
    vector<CombineArgs> ranks;
    for (int r = 0; r < world_size(); ++r) {
      CombineArgs a{};
      a.comm = world_.comm(r);
      a.plan = plans_[r];
      a.format = {c_.row_bytes, c_.row_bytes, with_weights ? c_.weight_bytes : 0, 0};
      a.handshake.hidden = c_.row_bytes;
      a.element = c_.element;
      a.y = reinterpret_cast<const char*>(memory_.copy(y[r]));
      a.out = memory_.make<char>(size_t{1} * c_.tokens[r] * c_.row_bytes);
      if (!row_weights.empty()) {
        a.row_weights = memory_.copy(row_weights[r]);
      }
      if (a.format.weight_bytes != 0) {
        back_.push_back(random_.bytes(weights_of(wanted_[r]) * c_.weight_bytes));
        a.weights = memory_.copy(back_[r]);
        a.out_weights = memory_.make<char>(size_t{1} * c_.tokens[r] * c_.num_topk * c_.weight_bytes);
      }
      ranks.push_back(a);
    }
    const auto launch_ranks = row_weights.empty() ? combine_file::ep::nvlink::launch_virtual<T, false>
                                                  : combine_file::ep::nvlink::launch_virtual<T, true>;
    by_columns(ranks, launch_ranks, [](CombineArgs& a, int bytes) {
      a.y += bytes;
      a.out += bytes;
    });
    return ranks;
  }

  // (sums, returned weights) of rank r.
  std::pair<vector<T>, vector<char>> wanted_of_combine(
      int r,
      const vector<vector<T>>& y,
      const vector<vector<Wide>>& row_weights,
      bool with_weights) const {
    vector<T> sums;
    vector<char> home(with_weights ? topk_[r].size() * c_.weight_bytes : 0);
    vector<int> sent(world_size());  // rows to each rank, so far
    for (int t = 0; t < c_.tokens[r]; ++t) {
      vector<Wide> total(hidden_, 0);
      bool is_first = true;
      vector<bool> seen(world_size());
      for (int k = 0; k < c_.num_topk; ++k) {
        const int expert = topk_[r][t * c_.num_topk + k];
        if (expert < 0) {
          continue;
        }
        const int to = expert / c_.num_local;
        const Wanted& w = wanted_[to];
        const int64_t wire_row = w.recv_begin[r] + sent[to];
        const int64_t row = w.row_of[wire_row * c_.num_topk + k];
        if (with_weights && row >= 0) {
          copy_row(
              home,
              t * c_.num_topk + k,
              back_[to],
              c_.expert_major ? row : wire_row * c_.num_topk + k,
              c_.weight_bytes);
        }
        if (seen[to]) {
          continue;
        }
        seen[to] = true;
        const auto term =
            reduce_row(c_, w, y[to], row_weights.empty() ? vector<Wide>() : row_weights[to], wire_row, hidden_);
        for (int j = 0; j < hidden_; ++j) {
          total[j] = is_first ? to_wide(term[j]) : total[j] + to_wide(term[j]);
        }
        is_first = false;
      }
      for (int to = 0; to < world_size(); ++to) {
        sent[to] += seen[to] ? 1 : 0;
      }
      for (const Wide v : total) {
        sums.push_back(rounded<T>(v));
      }
    }
    return {sums, home};
  }

  void check_combine(
      const std::string& name,
      const vector<vector<T>>& y,
      const vector<vector<Wide>>& row_weights,
      const vector<CombineArgs>& ranks) {
    for (int r = 0; r < world_size(); ++r) {
      const auto [sums, home] = wanted_of_combine(r, y, row_weights, ranks[r].format.weight_bytes != 0);
      const auto got = fetch(reinterpret_cast<const T*>(ranks[r].out), sums.size());
      expect(name + ": sums", r, as_numbers(got), as_numbers(sums));
      expect(name + ": weights", r, fetch(ranks[r].out_weights, home.size()), home);
    }
  }

  // Widened without loss; zeros keep their sign.
  static vector<Wide> as_numbers(const vector<T>& values) {
    vector<Wide> result;
    for (const T v : values) {
      result.push_back(to_wide(v));
    }
    return result;
  }

  World& world_;
  const Case& c_;
  Random& random_;
  const int hidden_;
  int64_t capacity_ = -1;
  Topk topk_;
  vector<Wanted> wanted_;
  Memory memory_;
  vector<PlanView> plans_;
  vector<vector<Wide>> row_weights_;
  vector<vector<char>> back_;  // weights that combine returns
};

void run_case(World& world, const Case& c, Random& random) {
  now_running = describe(c, world.num_blocks());
  switch (c.element) {
    case Element::f64:
      Run<double>(world, c, random).run();
      break;
    case Element::f32:
      Run<float>(world, c, random).run();
      break;
    case Element::bf16:
      Run<__nv_bfloat16>(world, c, random).run();
      break;
    case Element::f16:
      Run<__half>(world, c, random).run();
      break;
  }
  if (has_differences) {
    std::exit(1);
  }
  std::printf("%s\n", now_running.c_str());
  std::fflush(stdout);
}

// More tokens than a plan takes in one round, or than travel at once.
Case many_tokens(int world_size, bool expert_major) {
  Case c;
  c.tokens.assign(world_size, kMostTokens - 41);
  c.tokens[0] = kMostTokens;
  c.num_topk = 2;
  c.num_local = 2;
  c.expert_major = expert_major;
  c.capacity = expert_major ? Capacity::exact : Capacity::too_small;
  c.weight_bytes = 4;
  return c;
}

// ep::combine cuts the rows of one rank into more parts than those of another.
Case few_tokens(int world_size, bool expert_major) {
  Case c = many_tokens(world_size, expert_major);
  c.tokens.assign(world_size, 40);
  c.tokens[0] = 300;
  c.row_bytes = c.first_bytes = 9728;
  c.element = Element::bf16;
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  constexpr int kWorldSizes = 4, kMostRanks = 5, kLeastBlocks = 2, kMostBlocks = 4;
  if (kWorldSizes * kMostBlocks > multiprocessors) {
    fail("blocks wait for each other, and there are not enough multiprocessors for all of them");
  }
  // Case i is of world i % worlds. World by world, so that each one goes through many exchanges.
  constexpr int kWorlds = kWorldSizes * (kMostBlocks - kLeastBlocks + 1);
  for (int w = 0; w < kWorlds; ++w) {
    const int world_size = 1 + w % kWorldSizes;
    World world(world_size, kLeastBlocks + w / kWorldSizes);
    Random fixed(static_cast<uint64_t>(w));
    const Case many = many_tokens(world_size, w / kWorldSizes % 2 == 0);
    run_case(world, many, fixed);
    if (w < kWorldSizes) {
      run_case(world, few_tokens(world_size, w % 2 == 0), fixed);
    }
    if (world_size > 1) {
      Case one_row = many;
      one_row.first_bytes = one_row.row_bytes;
      now_running = "a mismatch, " + describe(one_row, world.num_blocks());
      Run<float>(world, one_row, fixed).disagree();
      if (w < kWorldSizes) {
        World without_one(world_size, world.num_blocks());
        now_running = "a rank is lost, " + describe(one_row, world.num_blocks());
        Run<float>(without_one, one_row, fixed).lose();
      }
    }
    for (int i = w; i < options.cases; i += kWorlds) {
      Random random(static_cast<uint64_t>(options.seed) << 32 | static_cast<uint64_t>(i));
      run_case(world, draw(random, world_size), random);
    }
  }
  // With more ranks, ep::plan takes fewer tokens of each in one round.
  World world(kMostRanks, kLeastBlocks);
  Random fixed(kWorlds);
  for (const bool expert_major : {false, true}) {
    run_case(world, many_tokens(kMostRanks, expert_major), fixed);
  }
  constexpr int64_t kShortRowBytes = 1024;  // buffers of long rows would take gigabytes
  World largest(kMaxRanks, kLeastBlocks, kShortRowBytes);
  for (const bool expert_major : {false, true}) {
    Case c = many_tokens(kMaxRanks, expert_major);
    c.tokens.assign(kMaxRanks, 40);
    c.num_topk = 9;
    run_case(largest, c, fixed);
  }
  std::printf("ok\n");
  return 0;
}
