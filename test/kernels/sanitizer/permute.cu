// The kernels of torch_ep/csrc/local, which need no peer: random plans, rows and weights on one GPU, compared bit by
// bit with the lines below that work them out on the host as torch_ep/csrc/local/permute_cpu.cpp does. Then plans with
// entries that lead anywhere, of which nothing is asked but that no kernel follows them.
//
//   nvcc -arch=sm_90a -std=c++20 -O3 -lineinfo -Xcompiler -ffp-contract=off permute.cu -o permute
//   compute-sanitizer --tool memcheck --error-exitcode 1 ./permute --cases 24
#include "common.cuh"

#include "local/permute_kernels.cu"
#include "local/permute_plan.cu"

#include <climits>
#include <cstdio>

namespace {

constexpr int kMostRanks = 3;  // each step of whose exchange is checked

// A rank's view of one batch.
struct Case {
  int num_tokens, num_topk, num_local, world_size;  // experts per rank
  bool expert_major, wide_idx;
  int alignment;
  int capacity;  // rows; -1: exact
  int hidden;
  Element element;
  int shift;  // elements between the start of an allocation and that of the rows
  int weight_bytes;
  bool weighted;

  int num_experts() const { return num_local * world_size; }
};

const char* name_of(Element element) {
  return element == Element::f64 ? "f64" : element == Element::f32 ? "f32" : element == Element::bf16 ? "bf16" : "f16";
}

std::string describe(const Case& c) {
  char text[300];
  std::snprintf(
      text,
      sizeof(text),
      "%d tokens, top-%d of %d x %d experts, %s, %s, alignment %d, capacity %d, %d x %s from %d, weights %d B",
      c.num_tokens,
      c.num_topk,
      c.world_size,
      c.num_local,
      c.expert_major ? "expert_major" : "rank_major",
      c.wide_idx ? "int64" : "int32",
      c.alignment,
      c.capacity,
      c.hidden,
      name_of(c.element),
      c.shift,
      c.weight_bytes);
  return text;
}

Case draw(Random& r) {
  Case c{};
  c.num_tokens = r.pick({0, 1, 7, 33, 70, 130});
  c.num_topk = r.pick({1, 2, 3, 8, 33, 70});
  c.num_local = r.pick({1, 2, 5, 16, 64, 700});
  c.world_size = r.pick({1, 1, 2, 3});
  c.expert_major = r.below(3) != 0;
  c.wide_idx = r.below(2) != 0;
  c.alignment = c.expert_major ? r.pick({1, 4, 16}) : 1;
  c.capacity = r.pick({-1, -1, 0, 16, 64, 400});
  c.hidden = r.pick({1, 3, 8, 64, 72, 130, 260, 515});
  c.element = static_cast<Element>(r.below(4));
  c.shift = r.below(4) == 0;
  c.weight_bytes = r.pick({0, 2, 4, 8});
  c.weighted = r.below(2) != 0;
  return c;
}

vector<int> draw_topk(const Case& c, Random& r) {
  vector<int> topk;
  const int holes = r.pick({0, 3, 3, 9});  // of ten slots
  for (int t = 0; t < c.num_tokens; ++t) {
    vector<int> experts(c.num_experts());
    for (int e = 0; e < c.num_experts(); ++e) {
      experts[e] = e;
    }
    for (int k = 0; k < c.num_topk; ++k) {
      if (k >= c.num_experts() || r.below(10) < holes) {
        topk.push_back(-1);
        continue;
      }
      std::swap(experts[k], experts[k + r.below(c.num_experts() - k)]);
      topk.push_back(experts[k]);
    }
  }
  return topk;
}

// --- what the kernels compute, on the host ---

struct Route {
  vector<int> send_row, send_counts, wire_topk;
};

Route route(const vector<int>& topk, int num_topk, int num_local, int world_size) {
  Route result{vector<int>(topk.size(), -1), vector<int>(world_size), {}};
  int row = 0;
  for (int rank = 0; rank < world_size; ++rank) {
    for (size_t t = 0; t < topk.size(); t += num_topk) {
      vector<int> here(num_topk, -1);
      bool visits = false;
      for (int k = 0; k < num_topk; ++k) {
        const int expert = topk[t + k];
        if (expert >= 0 && expert / num_local == rank) {
          here[k] = expert % num_local;
          result.send_row[t + k] = row;
          visits = true;
        }
      }
      if (visits) {
        result.wire_topk.insert(result.wire_topk.end(), here.begin(), here.end());
        ++result.send_counts[rank];
        ++row;
      }
    }
  }
  return result;
}

struct Placement {
  vector<int> recv_map, offsets, tokens_per_expert;
  int num_dropped = 0;
};

Placement place(const vector<int>& wire_topk, const Case& c) {
  const int wire_rows = static_cast<int>(wire_topk.size()) / c.num_topk;
  Placement result;
  if (!c.expert_major) {
    const int rows = c.capacity < 0 ? wire_rows : c.capacity, kept = std::min(rows, wire_rows);
    result.recv_map.assign(size_t(rows) * c.num_topk, -1);
    std::copy_n(wire_topk.begin(), kept * c.num_topk, result.recv_map.begin());
    result.offsets = {kept};
    result.tokens_per_expert.assign(c.num_local, 0);
    for (int i = 0; i < kept * c.num_topk; ++i) {
      if (wire_topk[i] >= 0) {
        ++result.tokens_per_expert[wire_topk[i]];
      }
    }
    result.num_dropped = wire_rows - kept;
    return result;
  }
  vector<int> slots;
  for (int expert = 0; expert < c.num_local; ++expert) {
    int count = 0, kept = 0;
    for (size_t i = 0; i < wire_topk.size(); ++i) {
      if (wire_topk[i] == expert) {
        kept += c.capacity < 0 || static_cast<int>(slots.size()) < c.capacity;
        slots.push_back(static_cast<int>(i));
        ++count;
      }
    }
    while (slots.size() % c.alignment != 0) {
      slots.push_back(-1);
    }
    result.tokens_per_expert.push_back(kept);
    result.num_dropped += count - kept;
    const int end = static_cast<int>(slots.size());
    result.offsets.push_back(c.capacity < 0 ? end : std::min(end, c.capacity));
  }
  if (c.capacity >= 0) {
    slots.resize(c.capacity, -1);
  }
  result.recv_map = slots;
  return result;
}

vector<int> row_of_pairs(const vector<int>& recv_pair, int wire_rows, int num_topk) {
  vector<int> result(size_t(wire_rows) * num_topk, -1);
  for (size_t row = 0; row < recv_pair.size(); ++row) {
    if (recv_pair[row] >= 0) {
      result[recv_pair[row]] = static_cast<int>(row);
    }
  }
  return result;
}

// The rows of every slot of an item in the result: [items, num_topk], -1 for none.
vector<int>
rows_of_slots(const vector<int>* send_row, const vector<int>* recv_pair, int wire_rows, int rows, int num_topk) {
  vector<int> row_of = recv_pair != nullptr ? row_of_pairs(*recv_pair, wire_rows, num_topk) : vector<int>();
  if (send_row == nullptr) {
    return row_of;
  }
  vector<int> result;
  for (size_t i = 0; i < send_row->size(); ++i) {
    const int wire_row = (*send_row)[i];
    if (recv_pair == nullptr) {
      result.push_back(wire_row < rows ? wire_row : -1);
    } else {
      result.push_back(wire_row < 0 ? -1 : row_of[size_t(wire_row) * num_topk + i % num_topk]);
    }
  }
  return result;
}

// --- one case ---

// Rows that begin `shift` elements after an allocation does.
template <class T>
struct Rows {
  T* data;
  size_t count;
};

template <class T>
class Run {
 public:
  using Wide = WideOf<T>;

  Run(const Case& c, Random& random) : c_(c), random_(random), topk_(draw_topk(c, random)) {
    reporter_ = {memory_.zeros<PermuteReport>(1), memory_.zeros<unsigned>(1)};
    device_topk_ = put_topk(topk_);
  }

  void run() {
    const Route routed = route(topk_, c_.num_topk, c_.num_local, c_.world_size);
    if (c_.world_size > 1) {
      check_route(routed);
      if (c_.world_size <= kMostRanks) {
        check_parts(routed);
      }
      return;
    }
    const Placement placed = place(routed.wire_topk, c_);
    check_plan(routed, placed);
    check_rows(
        &routed.send_row, c_.expert_major ? &placed.recv_map : nullptr, wire_rows(routed), num_rows(placed), true);
    follow_anything(routed, placed);
    if (c_.num_tokens > 0) {
      check_bad_index();
    }
    const PermuteReport report = fetch(reporter_.report, 1)[0];
    if (report.kind != PermuteReport::none) {
      fail("a good plan was reported as bad");
    }
  }

 private:
  int wire_rows(const Route& routed) const { return static_cast<int>(routed.wire_topk.size()) / c_.num_topk; }
  int num_rows(const Placement& placed) const {
    return static_cast<int>(placed.recv_map.size()) / (c_.expert_major ? 1 : c_.num_topk);
  }

  const void* put_topk(const vector<int>& topk) {
    if (!c_.wide_idx) {
      return memory_.copy(topk);
    }
    return memory_.copy(vector<int64_t>(topk.begin(), topk.end()));
  }

  PermutePlanArgs plan_args(const void* topk, int num_tokens, int num_experts, bool route) {
    PermutePlanArgs args{};
    args.topk_idx = topk;
    args.wide_idx = c_.wide_idx;
    args.route = route;
    args.num_tokens = num_tokens;
    args.num_topk = c_.num_topk;
    args.num_experts = num_experts;
    args.num_local_experts = route ? c_.num_local : num_experts;
    args.alignment = 1;
    args.capacity = -1;
    args.reporter = reporter_;
    args.reply = memory_.zeros<PlanReply>(1);
    args.scratch = memory_.make<int32_t>(permute_plan_scratch(args));
    return args;
  }

  void check_route(const Route& want) {
    PermutePlanArgs args = plan_args(device_topk_, c_.num_tokens, c_.num_experts(), true);
    args.send_row = memory_.make<int32_t>(topk_.size());
    args.send_counts = memory_.make<int32_t>(c_.world_size);
    args.wire_topk = memory_.make<int32_t>(want.wire_topk.size());
    check(launch_permute_plan(args, nullptr));
    check(cudaDeviceSynchronize());
    expect("route: reply", 0, fetch(args.reply, 1), {kPlanReady | static_cast<PlanReply>(wire_rows(want))});
    expect("send_row", 0, fetch(args.send_row, topk_.size()), want.send_row);
    expect("send_counts", 0, fetch(args.send_counts, c_.world_size), want.send_counts);
    expect("wire_topk", 0, fetch(args.wire_topk, want.wire_topk.size()), want.wire_topk);
  }

  // Each step of an exchange between ranks. What this rank sends to each is as good as what any would receive.
  void check_parts(const Route& routed) {
    check_rows(&routed.send_row, nullptr, wire_rows(routed), wire_rows(routed), false);
    for (int rank = 0, first = 0; rank < c_.world_size; first += routed.send_counts[rank++]) {
      const auto begin = routed.wire_topk.begin() + first * c_.num_topk;
      vector<int> wire_topk(begin, begin + routed.send_counts[rank] * c_.num_topk);
      if (!wire_topk.empty() && random_.below(2) != 0) {
        std::fill_n(wire_topk.begin(), c_.num_topk, -1);  // no route makes such a wire row; it counts as one
      }
      const Placement placed = place(wire_topk, c_);
      PermutePlanArgs args = plan_args(memory_.copy(wire_topk), routed.send_counts[rank], c_.num_local, false);
      args.wide_idx = false;
      check_placement(args, placed);
      if (c_.expert_major) {
        check_rows(nullptr, &placed.recv_map, routed.send_counts[rank], num_rows(placed), false);
      }
    }
  }

  void check_plan(const Route& routed, const Placement& placed) {
    PermutePlanArgs args = plan_args(device_topk_, c_.num_tokens, c_.num_experts(), false);
    args.send_row = memory_.make<int32_t>(topk_.size());
    args.send_counts = memory_.make<int32_t>(1);
    args.recv_counts = memory_.make<int32_t>(1);
    args.offsets = c_.expert_major ? nullptr : memory_.make<int32_t>(1);
    check_placement(args, placed);
    expect("send_row", 0, fetch(args.send_row, topk_.size()), routed.send_row);
    expect("send_counts", 0, fetch(args.send_counts, 1), routed.send_counts);
    expect("recv_counts", 0, fetch(args.recv_counts, 1), routed.send_counts);
    if (!c_.expert_major) {
      expect("offsets", 0, fetch(args.offsets, 1), placed.offsets);
    }
  }

  void check_placement(PermutePlanArgs args, const Placement& want) {
    args.expert_major = c_.expert_major;
    args.alignment = c_.alignment;
    args.capacity = c_.capacity;
    args.reply = c_.capacity < 0 ? args.reply : nullptr;
    const size_t entries = want.recv_map.size();
    args.recv_map = args.wide_idx && !c_.expert_major ? static_cast<void*>(memory_.make<int64_t>(entries))
                                                      : memory_.make<int32_t>(entries);
    if (c_.expert_major) {
      args.offsets = memory_.make<int32_t>(args.num_experts);
    }
    args.tokens_per_expert = memory_.make<int32_t>(args.num_experts);
    args.num_dropped = memory_.make<int32_t>(1);
    check(launch_permute_plan(args, nullptr));
    check(cudaDeviceSynchronize());
    if (args.reply != nullptr) {
      expect("reply", 0, fetch(args.reply, 1), {kPlanReady | static_cast<PlanReply>(num_rows(want))});
    }
    if (args.wide_idx && !c_.expert_major) {
      const vector<int64_t> wide(want.recv_map.begin(), want.recv_map.end());
      expect("recv_map", 0, fetch(static_cast<const int64_t*>(args.recv_map), entries), wide);
    } else {
      expect("recv_map", 0, fetch(static_cast<const int32_t*>(args.recv_map), entries), want.recv_map);
    }
    if (c_.expert_major) {
      expect("offsets", 0, fetch(args.offsets, args.num_experts), want.offsets);
    }
    expect("tokens_per_expert", 0, fetch(args.tokens_per_expert, args.num_experts), want.tokens_per_expert);
    expect("num_dropped", 0, fetch(args.num_dropped, 1), {want.num_dropped});
  }

  // --- rows ---

  T* make_rows(size_t count) { return memory_.make<T>(count + c_.shift) + c_.shift; }

  T* put_rows(const vector<T>& values) {
    T* result = make_rows(values.size());
    check(cudaMemcpy(result, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return result;
  }

  vector<T> draw_numbers(size_t n) {
    vector<T> result(n);
    for (T& v : result) {
      v = rounded<T>(random_.number());
    }
    return result;
  }

  RowMap map_of(
      const vector<int>* send_row,
      const vector<int>* recv_pair,
      int items,
      int wire_rows,
      int rows,
      const int32_t* wire_count) {
    RowMap map{};
    map.send_row = send_row != nullptr ? memory_.copy(*send_row) : nullptr;
    map.recv_pair = recv_pair != nullptr ? memory_.copy(*recv_pair) : nullptr;
    const size_t pairs = size_t(wire_rows) * c_.num_topk;
    // Whatever was there before. Not uninitialized, which initcheck would tell of.
    vector<int> garbage(recv_pair != nullptr ? pairs : 0);
    for (int& entry : garbage) {
      entry = random_.below(2) != 0 ? random_.below(rows + 2) : random_.pick({-1, -7, INT_MIN, INT_MAX});
    }
    map.row_of = memory_.copy(garbage);
    map.send_count = map.recv_count = wire_count;
    map.items = items;
    map.wire_rows = wire_rows;
    map.rows = rows;
    map.num_topk = c_.num_topk;
    map.reporter = reporter_;
    if (recv_pair != nullptr) {
      check(launch_invert_recv_pair(map, nullptr));
    }
    return map;
  }

  // `one_rank`: whole operators, by a map that knows on the device alone how many wire rows there are.
  void check_rows(const vector<int>* send_row, const vector<int>* recv_pair, int wire_rows, int rows, bool one_rank) {
    const int items = send_row != nullptr ? c_.num_tokens : wire_rows;
    const int most_wire_rows = one_rank ? c_.num_tokens : wire_rows;
    const int32_t* wire_count = one_rank ? memory_.copy(vector<int>{wire_rows}) : nullptr;
    const RowMap map = map_of(send_row, recv_pair, items, most_wire_rows, rows, wire_count);
    const vector<int> row_of = rows_of_slots(send_row, recv_pair, wire_rows, rows, c_.num_topk);
    check_permute(map, row_of);
    check_unpermute(map, row_of);
  }

  void check_permute(const RowMap& map, const vector<int>& row_of) {
    const int hidden = c_.hidden, num_topk = c_.num_topk;
    const bool by_pairs = map.recv_pair != nullptr;
    const vector<T> x = draw_numbers(size_t(map.items) * hidden);
    const vector<char> weights = random_.bytes(size_t(map.items) * num_topk * c_.weight_bytes);
    vector<T> rows(size_t(map.rows) * hidden, rounded<T>(0.0));
    vector<char> row_weights(size_t(map.rows) * (by_pairs ? 1 : num_topk) * c_.weight_bytes, 0);
    for (size_t i = 0; i < row_of.size(); ++i) {
      if (row_of[i] >= 0) {
        std::copy_n(x.begin() + i / num_topk * hidden, hidden, rows.begin() + size_t(row_of[i]) * hidden);
        const size_t to = by_pairs ? row_of[i] : size_t(row_of[i]) * num_topk + i % num_topk;
        std::copy_n(weights.begin() + i * c_.weight_bytes, c_.weight_bytes, row_weights.begin() + to * c_.weight_bytes);
      }
    }
    PermuteArgs args{};
    args.map = map;
    args.x = reinterpret_cast<const char*>(put_rows(x));
    T* out = make_rows(rows.size());
    args.out = reinterpret_cast<char*>(out);
    args.row_bytes = hidden * static_cast<int64_t>(sizeof(T));
    if (c_.weight_bytes != 0) {
      args.weights = memory_.copy(weights);
      args.out_weights = memory_.make<char>(row_weights.size());
      args.weight_bytes = c_.weight_bytes;
    }
    check(launch_permute_rows(args, nullptr));
    check(cudaDeviceSynchronize());
    expect("permute: rows", 0, as_bytes(fetch(out, rows.size())), as_bytes(rows));
    expect("permute: weights", 0, fetch(args.out_weights, row_weights.size()), row_weights);
  }

  void check_unpermute(const RowMap& map, const vector<int>& row_of) {
    const int hidden = c_.hidden, num_topk = c_.num_topk;
    const bool by_pairs = map.recv_pair != nullptr;
    const vector<T> y = draw_numbers(size_t(map.rows) * hidden);
    vector<Wide> row_weights(map.rows);
    for (Wide& w : row_weights) {
      w = static_cast<Wide>(random_.number());
    }
    const size_t own_weights = size_t(map.rows) * (by_pairs ? 1 : num_topk);
    const vector<char> weights = random_.bytes(own_weights * c_.weight_bytes);
    vector<T> sums;
    vector<char> home(row_of.size() * c_.weight_bytes, 0);
    for (int item = 0; item < map.items; ++item) {
      vector<int> rows;
      for (int k = 0; k < num_topk; ++k) {
        const size_t i = size_t(item) * num_topk + k;
        const int row = row_of[i];
        if (row < 0) {
          continue;
        }
        const size_t from = by_pairs ? row : size_t(row) * num_topk + k;
        std::copy_n(weights.begin() + from * c_.weight_bytes, c_.weight_bytes, home.begin() + i * c_.weight_bytes);
        if (by_pairs || std::find(rows.begin(), rows.end(), row) == rows.end()) {
          rows.push_back(row);
        }
      }
      for (int h = 0; h < hidden; ++h) {
        Wide total{0};
        for (size_t n = 0; n < rows.size(); ++n) {
          Wide term = to_wide(y[size_t(rows[n]) * hidden + h]);
          term = c_.weighted ? row_weights[rows[n]] * term : term;
          total = n == 0 ? term : total + term;
        }
        sums.push_back(rounded<T>(total));
      }
    }
    UnpermuteArgs args{};
    args.map = map;
    args.element = c_.element;
    args.y = reinterpret_cast<const char*>(put_rows(y));
    T* out = make_rows(sums.size());
    args.out = reinterpret_cast<char*>(out);
    args.hidden = hidden;
    args.row_weights = c_.weighted ? memory_.copy(row_weights) : nullptr;
    if (c_.weight_bytes != 0) {
      args.weights = memory_.copy(weights);
      args.out_weights = memory_.make<char>(home.size());
      args.weight_bytes = c_.weight_bytes;
    }
    check(launch_unpermute_rows(args, nullptr));
    check(cudaDeviceSynchronize());
    expect("unpermute: sums", 0, as_bytes(fetch(out, sums.size())), as_bytes(sums));
    expect("unpermute: weights", 0, fetch(args.out_weights, home.size()), home);
  }

  static vector<char> as_bytes(const vector<T>& values) {
    vector<char> result(values.size() * sizeof(T));
    if (!result.empty()) {
      std::memcpy(result.data(), values.data(), result.size());
    }
    return result;
  }

  // --- what is wrong ---

  // Some entries of the plan lead anywhere. The device tells of one that leads outside.
  void follow_anything(const Route& routed, const Placement& placed) {
    const auto spoil = [&](vector<int> entries) {
      for (int& entry : entries) {
        if (random_.below(3) == 0) {
          entry = random_.pick({-1, -2, 0, 1, random_.below(200), INT_MIN, INT_MAX, INT_MAX - 1});
        }
      }
      return entries;
    };
    const vector<int> send_row = spoil(routed.send_row), recv_map = spoil(placed.recv_map);
    const int count = random_.pick({wire_rows(routed), 0, -5, INT_MAX}), rows = num_rows(placed);
    const int32_t* wire_count = memory_.copy(vector<int>{count});
    const int bound = std::clamp(count, 0, c_.num_tokens);
    RowMap map =
        map_of(&send_row, c_.expert_major ? &recv_map : nullptr, c_.num_tokens, c_.num_tokens, rows, wire_count);
    map.is_combine = true;
    PermuteArgs permute{};
    permute.map = map;
    permute.x = reinterpret_cast<const char*>(put_rows(draw_numbers(size_t(c_.num_tokens) * c_.hidden)));
    // Poisoned, not left as it is: rows to which no good entry leads are not written.
    const vector<T> poison(size_t(rows) * c_.hidden, rounded<T>(3.0));
    permute.out = reinterpret_cast<char*>(put_rows(poison));
    permute.row_bytes = c_.hidden * static_cast<int64_t>(sizeof(T));
    check(launch_permute_rows(permute, nullptr));
    UnpermuteArgs unpermute{};
    unpermute.map = map;
    unpermute.element = c_.element;
    unpermute.y = permute.out;
    unpermute.out = reinterpret_cast<char*>(make_rows(size_t(c_.num_tokens) * c_.hidden));
    unpermute.hidden = c_.hidden;
    check(launch_unpermute_rows(unpermute, nullptr));
    check(cudaDeviceSynchronize());
    const auto is_bad = [](int entry, int64_t bound) { return entry < -1 || entry >= bound; };
    bool expects_report = false;
    for (const int entry : send_row) {
      expects_report = expects_report || is_bad(entry, bound);
    }
    for (const int entry : c_.expert_major ? recv_map : vector<int>()) {
      expects_report = expects_report || is_bad(entry, int64_t{bound} * c_.num_topk);
    }
    const PermuteReport report = take_report();
    if ((report.kind == PermuteReport::bad_plan) != expects_report) {
      fail("a bad plan: expected a report if there is a bad entry, got kind " + std::to_string(report.kind));
    }
    if (expects_report && !is_bad(static_cast<int>(report.value), report.bound)) {
      fail("a bad plan: reported " + std::to_string(report.value) + " below " + std::to_string(report.bound));
    }
  }

  PermuteReport take_report() {
    const PermuteReport report = fetch(reporter_.report, 1)[0];
    check(cudaMemset(reporter_.report, 0, sizeof(PermuteReport)));
    check(cudaMemset(reporter_.claimed, 0, sizeof(unsigned)));
    return report;
  }

  // The first bad entry is reported, and the plan is that of tokens without experts.
  void check_bad_index() {
    vector<int> topk = topk_;
    const int bad = random_.below(c_.num_tokens), slot = random_.below(c_.num_topk);
    const size_t index = size_t(bad) * c_.num_topk + slot;
    int earlier = -1;
    topk[index] = random_.pick({c_.num_experts(), -2, INT_MIN, INT_MAX});
    if (slot > 0 && random_.below(2) != 0) {
      earlier = random_.below(slot);
      topk[index] = topk[index - slot + earlier] = std::max(topk[index - slot + earlier], 0);
      for (int k = 0; k < slot; ++k) {
        if (k != earlier && topk[index - slot + k] == topk[index]) {
          topk[index - slot + k] = -1;
        }
      }
    }
    if (bad + 1 < c_.num_tokens) {
      topk[index + c_.num_topk] = -9;  // a later one is not reported
    }
    PermutePlanArgs args = plan_args(put_topk(topk), c_.num_tokens, c_.num_experts(), false);
    const int rows = std::max(c_.capacity, 0);
    args.expert_major = c_.expert_major;
    args.alignment = c_.alignment;
    args.capacity = rows;
    args.reply = nullptr;
    args.send_row = memory_.make<int32_t>(topk.size());
    args.send_counts = memory_.make<int32_t>(1);
    args.recv_counts = memory_.make<int32_t>(1);
    const size_t entries = size_t(rows) * (c_.expert_major ? 1 : c_.num_topk);
    args.recv_map = memory_.make<int64_t>(entries);
    args.offsets = memory_.make<int32_t>(c_.num_experts());
    args.tokens_per_expert = memory_.make<int32_t>(c_.num_experts());
    args.num_dropped = memory_.make<int32_t>(1);
    check(launch_permute_plan(args, nullptr));
    check(cudaDeviceSynchronize());
    const PermuteReport report = take_report();
    expect<int64_t>(
        "bad index: report",
        0,
        {report.kind, report.bound, report.value, report.token, report.slot, report.earlier_slot},
        {PermuteReport::bad_topk, c_.num_experts(), topk[index], bad, slot, earlier});
    expect("bad index: send_row", 0, fetch(args.send_row, topk.size()), vector<int>(topk.size(), -1));
    expect("bad index: send_counts", 0, fetch(args.send_counts, 1), {0});
    if (c_.expert_major || !c_.wide_idx) {
      expect("bad index: recv_map", 0, fetch(static_cast<int32_t*>(args.recv_map), entries), vector<int>(entries, -1));
    }
    expect(
        "bad index: tokens_per_expert",
        0,
        fetch(args.tokens_per_expert, c_.num_experts()),
        vector<int>(c_.num_experts(), 0));
    args.capacity = -1;
    args.reply = memory_.zeros<PlanReply>(1);
    check(launch_permute_plan(args, nullptr));
    check(cudaDeviceSynchronize());
    expect("bad index: reply", 0, fetch(args.reply, 1), {kPlanReady | kPlanBad});
  }

  const Case c_;
  Random& random_;
  const vector<int> topk_;
  Memory memory_;
  Reporter reporter_{};
  const void* device_topk_ = nullptr;
};

void run_case(const Case& c, Random& random) {
  now_running = describe(c);
  switch (c.element) {
    case Element::f64:
      Run<double>(c, random).run();
      break;
    case Element::f32:
      Run<float>(c, random).run();
      break;
    case Element::bf16:
      Run<__nv_bfloat16>(c, random).run();
      break;
    case Element::f16:
      Run<__half>(c, random).run();
      break;
  }
  if (has_differences) {
    std::exit(1);
  }
  std::printf("%s\n", now_running.c_str());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  check(prepare_permute_plan());
  // So many keys that a block has several words of tokens, and then that it places them one by one.
  Case many{};
  many.num_tokens = 500;
  many.num_topk = 2;
  many.alignment = 1;
  many.capacity = -1;
  many.hidden = 8;
  many.element = Element::bf16;
  for (const int keys : {6000, 13000}) {
    for (const bool several_ranks : {false, true}) {
      many.expert_major = !several_ranks;
      many.num_local = several_ranks ? 1 : keys;
      many.world_size = several_ranks ? keys : 1;
      Random fixed(keys);
      run_case(many, fixed);
    }
  }
  // A warp takes 32 slots at once: each token has one row, and slots of it in two such groups.
  Case slots = many;
  slots.num_tokens = 7;
  slots.num_topk = 40;
  slots.num_local = 64;
  slots.world_size = 1;
  slots.expert_major = false;
  Random fixed(slots.num_topk);
  run_case(slots, fixed);
  for (int i = 0; i < options.cases; ++i) {
    Random random(static_cast<uint64_t>(options.seed) << 32 | static_cast<uint64_t>(i));
    run_case(draw(random), random);
  }
  std::printf("ok\n");
  return 0;
}
