// Several ranks of the low-latency kernels on one GPU, all of them in each launch: see virtual_ranks.cu.
//
//   nvcc -arch=sm_90a -std=c++20 -O3 -lineinfo -Xcompiler -ffp-contract=off low_latency.cu -o low_latency
//   compute-sanitizer --tool memcheck --error-exitcode 1 ./low_latency --cases 24
//
// Random problems go through dispatch and combine, whole and in halves, up to two in flight. Results are compared bit
// by bit with those that the host computes below, as torch_ep/reference.py does.
#include "common.cuh"

#include <climits>
#include <memory>

namespace dispatch_file {
using namespace ::ep;
using namespace ::ep::nvlink;
#include "nvlink/kernels/low_latency_dispatch.cu"

namespace ep::nvlink {

template <class T, bool uses_packets>
__global__ void __launch_bounds__(kThreads, 1)
    virtual_dispatch(const LowLatencyDispatchArgs* ranks, const __grid_constant__ LowLatencyShape shape) {
  __shared__ LowLatencyShared shared;
  LowLatencyDispatch<uses_packets>(ranks[blockIdx.y], shape, shared).template run<T>();
}

template <class T, bool uses_packets>
cudaError_t launch_virtual_as(
    const std::vector<LowLatencyDispatchArgs>& ranks,
    const LowLatencyDispatchArgs* on_device,
    int multiprocessors) {
  const LowLatencyShape shape = shape_of<uses_packets>(ranks[0]);
  const auto shared = static_cast<int>(LowLatencyDispatch<uses_packets>::shared_bytes(shape, ranks[0]));
  const auto kernel = virtual_dispatch<T, uses_packets>;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) {
    return error;
  }
  int blocks = 0;
  for (const auto& args : ranks) {
    blocks = std::max(blocks, blocks_of<uses_packets>(args, shape, multiprocessors));
  }
  const dim3 grid(blocks, static_cast<unsigned>(ranks.size()));
  kernel<<<grid, kThreads, shared>>>(on_device, shape);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_virtual(
    const std::vector<LowLatencyDispatchArgs>& ranks,
    const LowLatencyDispatchArgs* on_device,
    int multiprocessors) {
  return uses_packets(ranks[0]) ? launch_virtual_as<T, true>(ranks, on_device, multiprocessors)
                                : launch_virtual_as<T, false>(ranks, on_device, multiprocessors);
}

}  // namespace ep::nvlink
}  // namespace dispatch_file

namespace combine_file {
using namespace ::ep;
using namespace ::ep::nvlink;
#include "nvlink/kernels/low_latency_combine.cu"

namespace ep::nvlink {

template <class T, Transfer transfer>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    virtual_combine(const LowLatencyCombineArgs* ranks, const __grid_constant__ CombineShape shape) {
  __shared__ LowLatencyExchangeState memory;
  LowLatencyCombine<T, transfer>(ranks[blockIdx.y], shape, memory).run();
}

template <class T>
cudaError_t launch_virtual(
    const std::vector<LowLatencyCombineArgs>& ranks,
    const LowLatencyCombineArgs* on_device,
    int multiprocessors) {
  const Transfer transfer = transfer_of(ranks[0]);
  const auto kernel = transfer == Transfer::packets ? virtual_combine<T, Transfer::packets>
                      : transfer == Transfer::bulk  ? virtual_combine<T, Transfer::bulk>
                                                    : virtual_combine<T, Transfer::either>;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) {
    return error;
  }
  int blocks = 0;
  for (const auto& args : ranks) {
    blocks = std::max(blocks, blocks_of(args, multiprocessors));
  }
  const dim3 grid(blocks, static_cast<unsigned>(ranks.size()));
  const CombineShape shape = shape_of(ranks[0], transfer, blocks);
  kernel<<<grid, kMaxWarps * kWarp, shared_bytes(transfer, shape)>>>(on_device, shape);
  return cudaGetLastError();
}

}  // namespace ep::nvlink
}  // namespace combine_file

namespace {

// --- ranks ---

constexpr int kMostTokens = 24;
constexpr int kPacketTokens = 4;  // fewer than kMostTokens, also of the shortest rows
constexpr int kMostLocal = 9;
constexpr int64_t kWireRowBytes = 10240;
// The timeout of exchanges that are to time out. Others must not, although emulated threads wait long for each other.
constexpr int64_t kShortNs = 4'000'000'000;
constexpr int kMultiprocessors = 5;  // of each rank, so that blocks have more than one token

class World {
 public:
  // `number`: of the last exchange of each kind, as if there had been as many.
  explicit World(int world_size, bool masks = false, int64_t timeout_ns = default_timeout_ns(), uint64_t number = 0) {
    const LowLatencyLayout layout(256, world_size, kMostTokens, kMaxTopk, kMostLocal, kWireRowBytes, kPacketTokens);
    for (int r = 0; r < world_size; ++r) {
      Comm comm{};
      State state{};
      for (auto& kind : state.low_latency) {
        kind.sent = kind.received = number << kShareBits;
      }
      comm.state = memory_.copy(vector<State>{state});
      comm.layout.world_size = world_size;
      comm.low_latency = layout;
      comm.rank = r;
      comm.timeout_ns = timeout_ns;
      comm.masks = masks;
      void* host_report = nullptr;
      check(cudaHostAlloc(&host_report, sizeof(HostReport), cudaHostAllocPortable | cudaHostAllocMapped));
      std::memset(host_report, 0, sizeof(HostReport));
      comm.host_report = static_cast<HostReport*>(host_report);
      comms_.push_back(comm);
    }
    for (int r = 0; r < world_size; ++r) {
      char* buffer = memory_.zeros<char>(layout.begin + layout.bytes());
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

  const Comm& comm(int rank) const { return comms_[rank]; }
  int size() const { return static_cast<int>(comms_.size()); }

  // Waits for all kernels. None may have failed, except with `failure` on rank 0.
  void settle(Failure failure = Failure::none) const {
    check(cudaDeviceSynchronize());
    for (const Comm& comm : comms_) {
      Failure& kind = comm.host_report->failure.kind;
      if (kind != (comm.rank == 0 ? failure : Failure::none)) {
        fail(failure_of(comm));
      }
      kind = Failure::none;
    }
  }

 private:
  Memory memory_;
  vector<Comm> comms_;
};

// --- problems ---

constexpr const char* kQuantize[] = {"bf16", "fp8", "fp8_pow2", "fp8_ue8m0"};

struct Case {
  vector<int> tokens;  // of each rank
  int max_tokens = 1, num_topk = 1, num_local = 1;
  Element element = Element::bf16;
  Quantize quantize = Quantize::none;
  int hidden = 8;
  bool wide_idx = false, weights = true;
  int holes = 0;  // of 8 entries
  bool one_expert = false;
  int lost = -1;  // a rank that does not come, and has no tokens

  int world_size() const { return static_cast<int>(tokens.size()); }
  int num_experts() const { return num_local * world_size(); }
  int rows() const { return world_size() * max_tokens; }  // C
};

std::string describe(const Case& c) {
  std::string text = std::to_string(c.world_size()) + " ranks, tokens";
  for (const int n : c.tokens) {
    text += ' ';
    text += std::to_string(n);
  }
  return text + " of " + std::to_string(c.max_tokens) + ", top-" + std::to_string(c.num_topk) + " of " +
         std::to_string(c.num_experts()) + " experts, hidden " + std::to_string(c.hidden) + ", element " +
         std::to_string(static_cast<int>(c.element)) + ", " + kQuantize[static_cast<int>(c.quantize)] +
         (c.weights ? ", weights" : "") + (c.wide_idx ? ", int64" : "") + ", holes " + std::to_string(c.holes) +
         (c.one_expert ? ", one expert" : "");
}

Case draw(Random& r, int world_size) {
  Case c;
  c.max_tokens = r.pick({1, 4, 8, kMostTokens});
  for (int i = 0; i < world_size; ++i) {
    c.tokens.push_back(r.below(4) == 0 ? 0 : r.below(c.max_tokens + 1));
  }
  c.num_topk = r.pick({1, 2, 8, 9, 16});
  c.num_local = r.pick({1, 2, 5, kMostLocal});
  c.element = r.pick({Element::bf16, Element::bf16, Element::f16, Element::f32});
  c.quantize = static_cast<Quantize>(r.below(4));
  c.hidden = r.pick({16, 112, 128, 144, 640, 2048});
  c.wide_idx = r.below(2) != 0;
  c.weights = r.below(4) != 0;
  c.holes = r.pick({0, 0, 2, 8});
  c.one_expert = r.below(6) == 0;
  return c;
}

// --- what is expected ---

// The number of a byte of e4m3.
float decode(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                    : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return byte >> 7 != 0 ? -value : value;
}

// The nearest number of e4m3; of two, the one with an even mantissa. No infinity: the largest is 448, 0x7e.
char encode(float value) {
  const float magnitude = std::fabs(value);
  int best = 0;
  for (int byte = 0; byte < 0x7f; ++byte) {
    const float distance = std::fabs(decode(byte) - magnitude), least = std::fabs(decode(best) - magnitude);
    if (distance < least || (distance == least && byte % 2 == 0)) {
      best = byte;
    }
  }
  return static_cast<char>(best | (std::signbit(value) ? 0x80 : 0));
}

template <class T>
class Run {
 public:
  Run(World& world, const Case& c, Random& random) : world_(world), c_(c), random_(random) {
    const int chosen = random.below(c.num_experts());
    for (int r = 0; r < c.world_size(); ++r) {
      vector<int> topk;
      vector<T> x;
      vector<float> weights;
      for (int t = 0; t < c.tokens[r]; ++t) {
        vector<int> slots(std::max(c.num_topk, c.num_experts()), -1);
        for (int e = 0; e < c.num_experts(); ++e) {
          slots[e] = e;
        }
        for (size_t i = slots.size(); i > 1; --i) {
          std::swap(slots[i - 1], slots[random.below(static_cast<int>(i))]);
        }
        for (int k = 0; k < c.num_topk; ++k) {
          const bool hole = random.below(8) < c.holes || (c.one_expert && k != chosen % c.num_topk);
          topk.push_back(hole ? -1 : c.one_expert ? chosen : slots[k]);
          weights.push_back(static_cast<float>(random.number()));
        }
        for (int j = 0; j < c.hidden; ++j) {
          x.push_back(rounded<T>(random.number()));
        }
      }
      topk_.push_back(topk);
      x_.push_back(x);
      weights_.push_back(weights);
    }
    row_bytes_ = c.hidden * (c.quantize == Quantize::none ? static_cast<int>(sizeof(T)) : 1);
    const int groups = (c.hidden + 127) / 128;
    num_scales_ = c.quantize == Quantize::none ? 0 : c.quantize == Quantize::fp8_ue8m0 ? (groups + 3) / 4 : groups;
    route();
  }

  void dispatch(Part part) {
    if (part != Part::receive) {
      dispatches_ = make_dispatches();
    }
    for (auto& args : dispatches_) {
      args.part = part;
    }
    check(dispatch_file::ep::nvlink::launch_virtual<T>(dispatches_, memory_.copy(dispatches_), kMultiprocessors));
  }

  void combine(Part part) {
    if (part != Part::receive) {
      combines_ = make_combines();
    }
    for (auto& args : combines_) {
      args.part = part;
    }
    check(combine_file::ep::nvlink::launch_virtual<T>(combines_, memory_.copy(combines_), kMultiprocessors));
  }

  void check_results() {
    for (size_t i = 0; i < dispatches_.size(); ++i) {
      const int r = dispatches_[i].comm.rank;
      check_dispatch(r, dispatches_[i]);
      const auto sums = wanted_sums(r);
      const auto got = fetch(reinterpret_cast<const T*>(combines_[i].out), sums.size());
      expect("combine", r, as_numbers(got), as_numbers(sums));
    }
  }

  // Two equal entries of a token are an error on their rank. In the exchange the second one counts as none, also where
  // later tokens have that expert.
  void spoil() {
    topk_[0][0] = topk_[0][1] = topk_[0][c_.num_topk] = 0;
    topk_[0][c_.num_topk + 1] = 1;
    dispatch(Part::both);
    world_.settle(Failure::duplicate_expert);
    const FailureReport& failure = world_.comm(0).host_report->failure;
    if (failure.token != 0 || failure.slot != 1 || failure.earlier_slot != 0 || failure.theirs != 0) {
      fail("a duplicate expert is " + failure_of(world_.comm(0)));
    }
    topk_[0][1] = -1;
    route();
    for (const auto& args : dispatches_) {
      check_dispatch(args.comm.rank, args);
    }
  }

 private:
  int rank_of(int expert) const { return expert / c_.num_local; }

  // recv_row and what follows from it.
  void route() {
    const int world_size = c_.world_size();
    recv_row_.assign(world_size, vector<int>(size_t{1} * c_.rows() * c_.num_topk, -1));
    recv_pair_.assign(world_size, vector<int>(size_t{1} * c_.num_local * c_.rows(), -1));
    ends_.assign(world_size, vector<int>(size_t{1} * c_.num_local * world_size));
    for (int r = 0; r < world_size; ++r) {
      for (int e = 0; e < c_.num_local; ++e) {
        int row = 0;
        for (int s = 0; s < world_size; ++s) {
          for (int i = 0; i < c_.tokens[s] * c_.num_topk; ++i) {
            if (topk_[s][i] == r * c_.num_local + e) {
              const int slot = s * c_.max_tokens * c_.num_topk + i;
              recv_row_[r][slot] = e * c_.rows() + row;
              recv_pair_[r][e * c_.rows() + row] = slot;
              ++row;
            }
          }
          ends_[r][e * world_size + s] = row;
        }
      }
    }
  }

  template <class Index>
  const void* copy_topk(int rank) {
    return memory_.copy(vector<Index>(topk_[rank].begin(), topk_[rank].end()));
  }

  vector<LowLatencyDispatchArgs> make_dispatches() {
    vector<LowLatencyDispatchArgs> ranks;
    const size_t rows = size_t{1} * c_.num_local * c_.rows();
    for (int r = 0; r < c_.world_size(); ++r) {
      if (r == c_.lost) {
        continue;
      }
      LowLatencyDispatchArgs a{};
      a.comm = world_.comm(r);
      a.handshake = handshake();
      a.status = memory_.make<int64_t>(2);
      a.x = reinterpret_cast<const char*>(memory_.copy(x_[r]));
      a.topk_idx = c_.wide_idx ? copy_topk<int64_t>(r) : copy_topk<int32_t>(r);
      a.wide_idx = c_.wide_idx;
      a.topk_weights = c_.weights ? memory_.copy(weights_[r]) : nullptr;
      a.num_tokens = c_.tokens[r];
      a.element = c_.element;
      a.rows = memory_.make_for_bulk(rows * row_bytes_);
      a.scale_rows = round_up(c_.rows(), 4);
      a.scales = memory_.make<float>(size_t{1} * c_.num_local * num_scales_ * a.scale_rows);
      a.tokens_per_expert = memory_.make<int32_t>(c_.num_local);
      a.source_offsets = memory_.make<int32_t>(size_t{1} * c_.num_local * c_.world_size());
      a.recv_pair = memory_.make<int32_t>(rows);
      a.recv_row = memory_.make<int32_t>(size_t{1} * c_.rows() * c_.num_topk);
      a.row_weights = memory_.make<float>(rows);
      a.wait_ns = memory_.make<int64_t>(c_.world_size());
      a.quantize = c_.quantize;
      a.max_tokens = c_.max_tokens;
      a.num_topk = c_.num_topk;
      a.num_experts = c_.num_experts();
      a.hidden = c_.hidden;
      a.row_bytes = row_bytes_;
      a.num_scales = num_scales_;
      ranks.push_back(a);
    }
    return ranks;
  }

  vector<LowLatencyCombineArgs> make_combines() {
    vector<LowLatencyCombineArgs> ranks;
    y_.clear();
    for (int r = 0; r < c_.world_size(); ++r) {
      // No number where there is no row, since that must not count.
      vector<T> y;
      for (const int slot : recv_pair_[r]) {
        for (int j = 0; j < c_.hidden; ++j) {
          y.push_back(rounded<T>(slot >= 0 ? random_.number() : std::numeric_limits<double>::quiet_NaN()));
        }
      }
      y_.push_back(y);
      if (r == c_.lost) {
        continue;
      }
      const LowLatencyDispatchArgs& dispatched = dispatches_[ranks.size()];
      LowLatencyCombineArgs a{};
      a.comm = world_.comm(r);
      a.handshake = handshake();
      a.status = memory_.make<int64_t>(2);
      a.y = reinterpret_cast<const char*>(memory_.copy(y));
      a.row_weights = dispatched.row_weights;
      a.recv_row = dispatched.recv_row;
      a.max_tokens = c_.max_tokens;
      a.out = memory_.make<char>(size_t{1} * c_.tokens[r] * c_.hidden * sizeof(T));
      a.topk_idx = dispatched.topk_idx;
      a.wide_idx = c_.wide_idx;
      a.num_tokens = c_.tokens[r];
      a.wait_ns = memory_.make<int64_t>(c_.world_size());
      a.element = c_.element;
      a.num_topk = c_.num_topk;
      a.num_experts = c_.num_experts();
      a.row_bytes = c_.hidden * static_cast<int>(sizeof(T));
      ranks.push_back(a);
    }
    return ranks;
  }

  Handshake handshake() const {
    Handshake handshake{};
    handshake.num_experts = c_.num_experts();
    handshake.num_topk = c_.num_topk;
    handshake.hidden = c_.hidden;
    handshake.max_tokens = c_.max_tokens;
    handshake.quantize = static_cast<int>(c_.quantize);
    return handshake;
  }

  float weight_of(int slot) const {
    const int source = slot / (c_.max_tokens * c_.num_topk);
    return c_.weights ? weights_[source][slot % (c_.max_tokens * c_.num_topk)] : 1;
  }

  // (bytes of a row, its scales as words of four bytes).
  std::pair<vector<char>, vector<uint32_t>> wanted_row(int slot) const {
    const int source = slot / (c_.max_tokens * c_.num_topk);
    const int token = slot % (c_.max_tokens * c_.num_topk) / c_.num_topk;
    const T* x = &x_[source][size_t{1} * token * c_.hidden];
    vector<char> row(row_bytes_);
    vector<uint32_t> scales(num_scales_);
    if (c_.quantize == Quantize::none) {
      std::memcpy(row.data(), x, row_bytes_);
      return {row, scales};
    }
    for (int first = 0; first < c_.hidden; first += 128) {
      const int end = std::min(first + 128, c_.hidden), group = first / 128;
      float most = 1e-4F;
      for (int j = first; j < end; ++j) {
        most = std::max(most, std::fabs(to_wide(x[j])));
      }
      float scale = most / 448, inverse = 448 / most;
      if (c_.quantize != Quantize::fp8) {
        scale = std::exp2(std::ceil(std::log2(scale)));
        inverse = 1 / scale;
      }
      for (int j = first; j < end; ++j) {
        row[j] = encode(to_wide(x[j]) * inverse);
      }
      uint32_t bits = 0;
      std::memcpy(&bits, &scale, sizeof(bits));
      if (c_.quantize == Quantize::fp8_ue8m0) {
        scales[group / 4] |= bits >> 23 << group % 4 * 8;
      } else {
        scales[group] = bits;
      }
    }
    return {row, scales};
  }

  void check_dispatch(int r, const LowLatencyDispatchArgs& a) const {
    vector<int> totals;
    for (int e = 0; e < c_.num_local; ++e) {
      totals.push_back(ends_[r][(e + 1) * c_.world_size() - 1]);
    }
    expect("tokens_per_expert", r, fetch(a.tokens_per_expert, totals.size()), totals);
    expect("source_offsets", r, fetch(a.source_offsets, ends_[r].size()), ends_[r]);
    expect("recv_pair", r, fetch(a.recv_pair, recv_pair_[r].size()), recv_pair_[r]);
    expect("recv_row", r, fetch(a.recv_row, recv_row_[r].size()), recv_row_[r]);
    for (int e = 0; e < c_.num_local; ++e) {
      // Nothing is written after the rows of an expert: that is not fetched, for initcheck.
      const size_t begin = size_t{1} * e * c_.rows(), count = totals[e];
      const auto rows = fetch(a.rows + begin * row_bytes_, count * row_bytes_);
      const auto weights = fetch(a.row_weights + begin, count);
      vector<vector<uint32_t>> scales;
      for (int j = 0; j < num_scales_; ++j) {
        const auto* of_rows = static_cast<const uint32_t*>(a.scales) + (e * num_scales_ + j) * a.scale_rows;
        scales.push_back(fetch(of_rows, count));
      }
      for (size_t i = 0; i < count; ++i) {
        const int slot = recv_pair_[r][begin + i];
        const auto [row, row_scales] = wanted_row(slot);
        expect("rows", r, vector<char>(&rows[i * row_bytes_], &rows[i * row_bytes_] + row_bytes_), row);
        expect("row_weights", r, vector<float>{weights[i]}, vector<float>{weight_of(slot)});
        vector<uint32_t> got;
        for (const auto& of_rows : scales) {
          got.push_back(of_rows[i]);
        }
        expect("scales", r, got, row_scales);
      }
    }
  }

  vector<T> wanted_sums(int r) const {
    vector<T> sums;
    for (int t = 0; t < c_.tokens[r]; ++t) {
      vector<float> total(c_.hidden, 0);
      bool is_first = true;
      vector<bool> seen(c_.world_size());
      for (int k = 0; k < c_.num_topk; ++k) {
        const int expert = topk_[r][t * c_.num_topk + k];
        if (expert < 0 || seen[rank_of(expert)] || rank_of(expert) == c_.lost) {
          continue;
        }
        const int to = rank_of(expert), first = (r * c_.max_tokens + t) * c_.num_topk;
        seen[to] = true;
        vector<float> part(c_.hidden, 0);
        bool is_first_row = true;
        for (int slot = first; slot < first + c_.num_topk; ++slot) {
          const int row = recv_row_[to][slot];
          for (int j = 0; row >= 0 && j < c_.hidden; ++j) {
            const float term = weight_of(slot) * to_wide(y_[to][size_t{1} * row * c_.hidden + j]);
            part[j] = is_first_row ? term : part[j] + term;
          }
          is_first_row = is_first_row && row < 0;
        }
        for (int j = 0; j < c_.hidden; ++j) {
          const float term = to_wide(rounded<T>(part[j]));
          total[j] = is_first ? term : total[j] + term;
        }
        is_first = false;
      }
      for (const float v : total) {
        sums.push_back(rounded<T>(v));
      }
    }
    return sums;
  }

  static vector<float> as_numbers(const vector<T>& values) {
    vector<float> result;
    for (const T v : values) {
      result.push_back(to_wide(v));
    }
    return result;
  }

  World& world_;
  const Case& c_;
  Random& random_;
  int row_bytes_, num_scales_;
  vector<vector<int>> topk_;
  vector<vector<T>> x_, y_;
  vector<vector<float>> weights_;
  vector<vector<int>> recv_row_, recv_pair_, ends_;  // of each rank
  Memory memory_;
  vector<LowLatencyDispatchArgs> dispatches_;
  vector<LowLatencyCombineArgs> combines_;
};

// One rank never comes. The others mask it after the timeout, and never wait for it again.
void lose_a_rank(int world_size) {
  World world(world_size, true, kShortNs);
  for (int i = 0; i < 6; ++i) {
    Random random(static_cast<uint64_t>(i));
    Case c = draw(random, world_size);
    c.element = Element::bf16;
    c.lost = world_size - 2;
    c.tokens[c.lost] = 0;
    now_running = "without rank " + std::to_string(c.lost) + ", " + describe(c);
    Run<__nv_bfloat16> run(world, c, random);
    run.dispatch(Part::both);
    run.combine(Part::both);
    world.settle();
    run.check_results();
    for (int r = 0; r < world_size; ++r) {
      const uint32_t masked = fetch(world.comm(r).state->masked_by_timeout, 1)[0];
      if (r != c.lost && masked != 1U << c.lost) {
        fail("rank " + std::to_string(r) + " has masked the ranks of bits " + std::to_string(masked));
      }
    }
  }
}

// Exchanges are received in the order in which they were sent, and at most two are in flight.
void misuse(int world_size, Failure failure) {
  World world(world_size, false, kShortNs);
  Random random(0);
  Case c;
  c.tokens.assign(world_size, 2);
  c.max_tokens = 2;
  now_running = "misuse, " + describe(c);
  vector<std::unique_ptr<Run<__nv_bfloat16>>> runs;
  for (int i = 0; i < (failure == Failure::out_of_order ? 2 : 3); ++i) {
    runs.push_back(std::make_unique<Run<__nv_bfloat16>>(world, c, random));
    runs[i]->dispatch(Part::send);
  }
  if (failure == Failure::out_of_order) {
    runs[1]->dispatch(Part::receive);
  }
  check(cudaDeviceSynchronize());
  for (int r = 0; r < world_size; ++r) {
    const HostReport& report = *world.comm(r).host_report;
    if (report.failure.kind != failure || report.failure.peer != r || report.stopped == 0) {
      fail(failure_of(world.comm(r)));
    }
  }
}

void divide() {
  now_running = "divisors";
  Random random(0);
  for (int divisor = 1; divisor < 1 << 20; divisor += divisor < 600 ? 1 : divisor / 3) {
    const Divisor by(divisor);
    for (int i = 0; i < 200; ++i) {
      const int factor = random.below(INT_MAX / divisor) + 1;
      for (const int n : {i, INT_MAX - i, random.below(INT_MAX), divisor * factor - 1, divisor * factor}) {
        if (by.quotient(n) != n / divisor) {
          fail(
              std::to_string(n) + " / " + std::to_string(divisor) + " is said to be " + std::to_string(by.quotient(n)));
        }
      }
    }
  }
}

// Batches of one shape, each sent before the one before is received: a rank may be as far ahead as credits allow.
template <class T>
void run_many(World& world, const Case& c, Random& random) {
  constexpr int kBatches = 4;
  vector<std::unique_ptr<Run<T>>> runs;
  for (int i = 0; i < kBatches; ++i) {
    runs.push_back(std::make_unique<Run<T>>(world, c, random));
  }
  const auto exchange = [&](auto part_of) {
    for (int i = 0; i <= kBatches; ++i) {
      if (i < kBatches) {
        part_of(*runs[i], Part::send);
      }
      if (i > 0) {
        part_of(*runs[i - 1], Part::receive);
      }
    }
  };
  exchange([](Run<T>& run, Part part) { run.dispatch(part); });
  exchange([](Run<T>& run, Part part) { run.combine(part); });
  world.settle();
  for (const auto& run : runs) {
    run->check_results();
  }
}

template <class T>
void run_as(World& world, const Case& c, Random& random) {
  const int form = random.below(3);
  if (form == 0) {
    run_many<T>(world, c, random);
  } else if (form == 1) {
    Run<T> run(world, c, random);
    run.dispatch(Part::both);
    run.combine(Part::both);
    world.settle();
    run.check_results();
  } else {
    // Two batches of one shape in flight.
    Run<T> first(world, c, random), second(world, c, random);
    first.dispatch(Part::send);
    second.dispatch(Part::send);
    first.dispatch(Part::receive);
    first.combine(Part::send);
    second.dispatch(Part::receive);
    second.combine(Part::send);
    first.combine(Part::receive);
    second.combine(Part::receive);
    world.settle();
    first.check_results();
    second.check_results();
  }
  if (has_differences) {
    std::exit(1);
  }
}

void run_case(World& world, const Case& c, Random& random) {
  now_running = describe(c);
  if (c.element == Element::bf16) {
    run_as<__nv_bfloat16>(world, c, random);
  } else if (c.element == Element::f16) {
    run_as<__half>(world, c, random);
  } else {
    run_as<float>(world, c, random);
  }
  std::printf("%s\n", now_running.c_str());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  constexpr int kWorldSizes = 8;
  for (int w = 0; w < kWorldSizes; ++w) {
    World world(1 + w);
    for (int i = w; i < options.cases; i += kWorldSizes) {
      Random random(static_cast<uint64_t>(options.seed) << 32 | static_cast<uint64_t>(i));
      run_case(world, draw(random, 1 + w), random);
    }
    if (w >= 4) {
      continue;  // errors do not depend on the number of ranks
    }
    Random fixed(static_cast<uint64_t>(w));
    Case c;
    c.tokens.assign(1 + w, 3);
    c.max_tokens = 3;
    c.num_topk = c.num_local = 2;
    now_running = "a doubled expert, " + describe(c);
    Run<__nv_bfloat16>(world, c, fixed).spoil();
    if (world.size() > 1) {
      lose_a_rank(world.size());
    }
  }
  // Words and packets hold the lower 32 bits of the number, which wrap around here.
  World old(2, false, default_timeout_ns(), (uint64_t{1} << 32) - 5);
  for (int i = 0; i < 8; ++i) {
    Random random(static_cast<uint64_t>(i));
    run_case(old, draw(random, 2), random);
  }
  Random random(0);
  World many(kMaxRanks);
  Case two_tokens = draw(random, kMaxRanks);
  two_tokens.max_tokens = 2;
  two_tokens.tokens.assign(kMaxRanks, 2);
  run_case(many, two_tokens, random);
  divide();
  misuse(2, Failure::out_of_order);
  misuse(2, Failure::too_many_in_flight);
  std::printf("ok\n");
  return 0;
}
