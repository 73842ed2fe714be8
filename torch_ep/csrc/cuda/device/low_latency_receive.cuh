// What ep::low_latency_dispatch receives: announcements, then rows, each to its places in the result.
#pragma once

#include "low_latency.cuh"
#include "packs.cuh"
#include "rows.cuh"

namespace ep::cuda {

constexpr int kDispatchThreads = 512;
constexpr int kDispatchWarps = kDispatchThreads / kWarp;

// Of the launch.
struct LowLatencyShape {
  int stage_bytes;    // a record, padded
  int receive_warps;  // of a block, each with a stage; none if rows are packed
  int parts;          // of a packed row, a warp each
  Divisor by_parts, by_tokens, by_local, by_words, by_rows;
};

// On what all ranks have to agree: the words that an announcement begins with.
class Agreed {
 public:
  __device__ explicit Agreed(const LowLatencyDispatchArgs& args) : a_(args) {}

  __device__ uint32_t word(int i) const {
    static_assert(kNumAgreed == 4);
    switch (i) {
      case 0:
        return static_cast<uint32_t>(a_.num_topk) << kTopkShift | static_cast<uint32_t>(a_.num_experts);
      case 1:
        return static_cast<uint32_t>(a_.hidden);
      case 2:
        return static_cast<uint32_t>(a_.max_tokens);
      default:
        return static_cast<uint32_t>(a_.element) << kTopkShift | static_cast<uint32_t>(a_.quantize);
    }
  }
  // As the host prints it.
  __device__ static int64_t shown(int i, uint32_t word) {
    const bool is_two = i == 0 || i == kNumAgreed - 1;
    return is_two ? int64_t{word >> kTopkShift} << 32 | (word & ((1U << kTopkShift) - 1)) : int64_t{word};
  }

 private:
  static constexpr int kTopkShift = 24;
  const LowLatencyDispatchArgs& a_;
};

// Shared memory of a block.
struct LowLatencyMemory {
  char* stages;        // a record each
  uint64_t* barriers;  // of each warp
  int* words;
  bool* is_lost;  // of each rank
};

template <bool is_packed>
class LowLatencyReceive {
 public:
  // `loads`: that the barrier of this warp has counted before.
  __device__ LowLatencyReceive(
      const LowLatencyDispatchArgs& args,
      const LowLatencyShape& shape,
      const Flight& flight,
      const LowLatencyMemory& memory,
      int loads)
      : a_(args),
        shape_(shape),
        f_(flight),
        memory_(memory),
        loads_(loads),
        num_local_(args.num_experts / args.comm.low_latency.world_size),
        scales_at_(static_cast<int>(args.scales_at())),
        places_at_(static_cast<int>(args.places_at())),
        record_bytes_(static_cast<int>(args.record_bytes())) {}

  __device__ void run() const {
    const auto tid = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int world_size = f_.world_size(), words = layout().words;
    int* begins = memory_.words + world_size * words;
    const Heard heard{memory_.words, begins, words};
    if (!hear(memory_.words)) {
      return;
    }
    // Looked at before places are counted, so that the one hides the other.
    PartOfRow first{};
    const bool comes = is_packed && first_part() < num_parts() && look_first(first, heard, first_part());
#pragma unroll 1
    for (int e = tid; e < num_local_; e += kDispatchThreads) {
      int end = 0;
#pragma unroll 1
      for (int s = 0; s < world_size; ++s) {
        begins[s * num_local_ + e] = end;
        end += heard.count(s, e);
        if (block == 0) {
          a_.source_offsets[e * world_size + s] = end;
        }
      }
      if (block == 0) {
        a_.tokens_per_expert[e] = end;
      }
    }
    __syncthreads();
    fill_slots(heard);
    if constexpr (is_packed) {
      receive_packed(heard, first, comes);
    } else if (warp_id() < shape_.receive_warps) {
      receive_rows(heard);
    }
  }

 private:
  __device__ const LowLatencyLayout& layout() const { return f_.layout(); }

  // What has arrived of the plan, in shared memory.
  struct Heard {
    const int* words;   // [world_size][words of an announcement]
    const int* begins;  // [world_size][local experts]: rows that come before those of the source
    int stride;

    __device__ int count(int source, int expert) const { return words[source * stride + kNumAgreed + expert]; }
    __device__ bool visits(const LowLatencyLayout& layout, int source, int token) const {
      const int word = kNumAgreed + layout.num_local_experts + token / 32;
      return (words[source * stride + word] >> token % 32 & 1) != 0;
    }
  };

  __device__ const char* word_at(int source, int i) const {
    return f_.own(layout().announcement(f_.half(), source)) + int64_t{i} * 8;
  }

  // Word `i` of what `source` announced, as it is kept. False: another exchange.
  __device__ bool keep(int& kept, int source, int i, uint32_t value) const {
    const Agreed agreed(a_);
    const bool is_count = i >= kNumAgreed && i < kNumAgreed + num_local_;
    kept = is_count ? min(max(static_cast<int>(value), 0), a_.max_tokens) : static_cast<int>(value);
    if (i >= kNumAgreed || value == agreed.word(i)) {
      return true;
    }
    if (blockIdx.x == 0) {
      const auto number = static_cast<int64_t>(f_.number());
      f_.record(
          {Failure::mismatch,
           Phase::header,
           source,
           1 + i,
           agreed.shown(i, agreed.word(i)),
           agreed.shown(i, value),
           number});
    }
    return false;
  }

  // Of a whole block: what every rank announced. False: failed, or not all announced the same exchange.
  __device__ bool hear(int* heard) const {
    const int words = layout().words, all = f_.world_size() * words;
    bool going = true;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); going && i < all; i += kDispatchThreads) {
      const int s = shape_.by_words.quotient(i), word = i - s * words;
      const char* from = word_at(s, word);
      uint64_t value = 0;
      auto outcome = Outcome::absent;
      if (f_.is_active(s)) {
        outcome = f_.wait(Phase::header, s, word == 0, [&] {
          value = load_relaxed_system(from);
          return f_.is_word(value);
        });
      }
      if (outcome == Outcome::there) {
        going = keep(heard[i], s, word, static_cast<uint32_t>(value));
      } else {
        going = outcome == Outcome::absent;
        memory_.is_lost[s] = true;
        heard[i] = 0;
      }
    }
    going = __syncthreads_and(going) != 0;
    return going && (!f_.masks() || hear_together(heard));
  }

  // Where time-outs mask: of one mind with all other blocks on who takes part.
  __device__ bool hear_together(int* heard) const {
    __shared__ bool is_there[kMaxRanks];
    const int words = layout().words, s = lane_id();
    bool same = true;
    if (warp_id() == 0 && s < f_.world_size()) {
      is_there[s] = f_.decide(s, !memory_.is_lost[s]);
#pragma unroll 1
      for (int i = 0; is_there[s] && memory_.is_lost[s] && i < words; ++i) {
        // Another block has heard it, so it is there.
        same = keep(heard[s * words + i], s, i, static_cast<uint32_t>(load_relaxed_system(word_at(s, i)))) && same;
      }
    }
    same = __syncthreads_and(same) != 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < f_.world_size() * words; i += kDispatchThreads) {
      heard[i] = is_there[shape_.by_words.quotient(i)] ? heard[i] : 0;
    }
    __syncthreads();
    return same;
  }

  // Slots of rows that nobody sent.
  __device__ void fill_slots(const Heard& heard) const {
    const int rows_of_expert = f_.world_size() * a_.max_tokens, last = f_.world_size() - 1;  // C
    const int begin = static_cast<int>(blockIdx.x) * kDispatchThreads + static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = begin; i < num_local_ * rows_of_expert; i += f_.workers() * kDispatchThreads) {
      const int e = shape_.by_rows.quotient(i);
      if (i - e * rows_of_expert >= heard.begins[last * num_local_ + e] + heard.count(last, e)) {
        a_.recv_slot[i] = -1;
      }
    }
  }

  // The row of a slot whose place is known, or -1.
  __device__ int64_t row_at(const Heard& heard, int source, int expert_of_all, int index) const {
    const int expert = expert_of_all - f_.me() * num_local_;
    if (expert_of_all < 0 || expert < 0 || expert >= num_local_ || index < 0 || index >= heard.count(source, expert)) {
      return -1;
    }
    const int64_t rows_of_expert = int64_t{f_.world_size()} * a_.max_tokens;
    return expert * rows_of_expert + heard.begins[source * num_local_ + expert] + index;
  }

  // Of lane k for slot k of a token. `i`: source * max_tokens + token.
  __device__ void write_slot(int i, int64_t row, float weight) const {
    const int64_t slot = int64_t{i} * a_.num_topk + lane_id();
    if (lane_id() < a_.num_topk) {
      a_.recv_row[slot] = static_cast<int>(row);
    }
    if (row >= 0) {
      a_.recv_slot[row] = static_cast<int>(slot);
      a_.row_weights[row] = weight;
    }
  }

  // The first word of the scales of a row; the next is scale_rows further.
  __device__ int* scales_of(int64_t row) const {
    const int rows_of_expert = f_.world_size() * a_.max_tokens, expert = shape_.by_rows.quotient(static_cast<int>(row));
    return static_cast<int*>(a_.scales) + expert * a_.num_scales * a_.scale_rows +
           (row - int64_t{expert} * rows_of_expert);
  }

  // A part of a row on its way: a chunk of it, or its scales, and the Places.
  struct PartOfRow {
    int i, part, source, token;  // i: source * max_tokens + token
    uint4 place;
    Packs packs;  // of scales: one
  };

  __device__ int first_part() const { return static_cast<int>(blockIdx.x) + f_.workers() * warp_id(); }
  __device__ int num_parts() const { return f_.world_size() * a_.max_tokens * shape_.parts; }
  __device__ bool has_place() const { return lane_id() < a_.num_topk; }
  __device__ bool is_chunk(const PartOfRow& p) const { return p.part * kChunkVectors < a_.row_bytes / 16; }
  // Vectors of a chunk from this lane's unit on.
  __device__ int vectors_left(const PartOfRow& p) const {
    return a_.row_bytes / 16 - (p.part * kUnitsAChunk + lane_id()) * kUnitVectors;
  }

  // Whose part it is; and the first look at it, if it is to come: false if not.
  __device__ bool look_first(PartOfRow& p, const Heard& heard, int n) const {
    p.i = shape_.by_parts.quotient(n);
    p.part = n - p.i * shape_.parts;
    p.source = shape_.by_tokens.quotient(p.i);
    p.token = p.i - p.source * a_.max_tokens;
    const bool comes = heard.visits(layout(), p.source, p.token);
    if (comes) {
      look(p, lane_id() * 3);
    }
    return comes;
  }

  // `first_scale`: of those this lane gets.
  __device__ void look(PartOfRow& p, int first_scale) const {
    const char* from = f_.own(layout().dispatch_packs(f_.half(), p.source, p.token));
    if (has_place()) {
      p.place = load_relaxed_system_16(from + lane_id() * kPackBytes);
    }
    if (!is_chunk(p)) {
      if (first_scale < a_.num_scales) {
        p.packs.packs[0] = load_relaxed_system_16(from + layout().scale_packs_at + first_scale / 3 * kPackBytes);
      }
    } else if (vectors_left(p) > 0) {
      p.packs.look(from + layout().row_packs_at, p.part * kUnitsAChunk + lane_id());
    }
  }

  __device__ bool has_arrived(const PartOfRow& p, int first_scale) const {
    if (has_place() && p.place.w != f_.tag()) {
      return false;
    }
    return is_chunk(p) ? vectors_left(p) <= 0 || p.packs.arrived(f_.tag())
                       : first_scale >= a_.num_scales || p.packs.packs[0].w == f_.tag();
  }

  // Of a whole warp, after a look.
  __device__ Outcome await(PartOfRow& p, int first_scale) const {
    auto outcome = Outcome::there;
    if (!has_arrived(p, first_scale)) {
      outcome = f_.wait(Phase::rows, p.source, lane_id() == 0, [&] {
        look(p, first_scale);
        return has_arrived(p, first_scale);
      });
    }
    return of_warp(outcome);
  }

  // Warps, each a part of one row. `p`: the first, looked at if it `comes`.
  __device__ void receive_packed(const Heard& heard, PartOfRow& p, bool comes) const {
#pragma unroll 1
    for (int n = first_part(); n < num_parts(); n += f_.workers() * kDispatchWarps) {
      if (n != first_part()) {
        comes = look_first(p, heard, n);
      }
      int64_t row = -1;
      float weight = 0;
      if (comes) {
        const auto find_row = [&] {
          row = has_place() ? row_at(heard, p.source, static_cast<int>(p.place.x), static_cast<int>(p.place.y)) : -1;
          weight = __uint_as_float(p.place.z);
        };
        const auto outcome = is_chunk(p) ? receive_chunk(p, find_row, row) : receive_scales(p, find_row, row);
        if (outcome == Outcome::failed) {
          break;
        }
      }
      if (p.part == 0) {
        write_slot(p.i, row, weight);
      }
    }
  }

  // Of a whole warp: of all its lanes, whether they may go on.
  __device__ static Outcome of_warp(Outcome outcome) {
    if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
      return Outcome::failed;
    }
    return __all_sync(kFullWarp, outcome == Outcome::there) ? Outcome::there : Outcome::absent;
  }

  // Of a whole warp: a chunk of a row, a unit a lane.
  template <class FindRow>
  __device__ Outcome receive_chunk(PartOfRow& p, const FindRow& find_row, const int64_t& row) const {
    const auto outcome = await(p, 0);
    if (outcome == Outcome::there) {
      find_row();
      const int left_vectors = vectors_left(p), unit = p.part * kUnitsAChunk + lane_id();
      const Unit u = p.packs.unit();
      const uint64_t first = reinterpret_cast<uint64_t>(a_.rows + row * a_.row_bytes);
#pragma unroll 1
      for (uint32_t left = __ballot_sync(kFullWarp, row >= 0); left != 0; left &= left - 1) {
        auto* to = reinterpret_cast<uint4*>(__shfl_sync(kFullWarp, first, __ffs(static_cast<int>(left)) - 1)) +
                   unit * kUnitVectors;
#pragma unroll
        for (int j = 0; j < kUnitVectors; ++j) {
          if (j < left_vectors) {
            to[j] = u.vectors[j];
          }
        }
      }
    }
    return outcome;
  }

  // Of a whole warp: the scales of a row, three words a lane.
  template <class FindRow>
  __device__ Outcome receive_scales(PartOfRow& p, const FindRow& find_row, const int64_t& row) const {
    auto outcome = Outcome::there;
#pragma unroll 1
    for (int begin = 0; outcome == Outcome::there && begin < a_.num_scales; begin += 3 * kWarp) {
      const int first = begin + 3 * lane_id();
      if (begin != 0) {
        look(p, first);
      }
      outcome = await(p, first);
      if (outcome != Outcome::there) {
        break;
      }
      find_row();
      const uint64_t to_row = reinterpret_cast<uint64_t>(scales_of(max(row, int64_t{0})));
      const uint4& pack = p.packs.packs[0];
      const uint32_t words[3] = {pack.x, pack.y, pack.z};
#pragma unroll 1
      for (uint32_t left = __ballot_sync(kFullWarp, row >= 0); left != 0; left &= left - 1) {
        auto* to = reinterpret_cast<uint32_t*>(__shfl_sync(kFullWarp, to_row, __ffs(static_cast<int>(left)) - 1)) +
                   first * a_.scale_rows;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          if (first + j < a_.num_scales) {
            to[j * a_.scale_rows] = words[j];
          }
        }
      }
    }
    return outcome;
  }

  // Warps, each a row.
  __device__ void receive_rows(const Heard& heard) const {
    const int lane = lane_id(), rows_of_expert = f_.world_size() * a_.max_tokens;
    char* stage = memory_.stages + int64_t{warp_id()} * shape_.stage_bytes;
    uint64_t* barrier = &memory_.barriers[warp_id()];
    int n = loads_;
    const int step = f_.workers() * shape_.receive_warps;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) + f_.workers() * warp_id(); i < rows_of_expert; i += step) {
      const int source = shape_.by_tokens.quotient(i), token = i - source * a_.max_tokens;
      int64_t row = -1;
      float weight = 0;
      if (heard.visits(layout(), source, token)) {
        const char* flag = f_.own(layout().dispatch_flag(f_.half(), source, token));
        auto outcome = Outcome::there;
        if (lane == 0) {
          outcome = f_.wait(Phase::rows, source, true, [&] { return load_acquire_system(flag) == f_.number(); });
        }
        if (__any_sync(kFullWarp, outcome == Outcome::failed)) {
          break;
        }
        if (__all_sync(kFullWarp, outcome == Outcome::there)) {
          bulk_wait_read<0>();  // of what left from this stage
          __syncwarp();
          if (lane == 0) {
            fence_async_global();  // between the flag and the bulk copy of what it tells of
            fence_async_shared();
            barrier_expect(barrier, record_bytes_);
            bulk_load(stage, f_.own(layout().dispatch_row(f_.half(), source, token)), record_bytes_, barrier);
          }
          barrier_wait(barrier, n++ % 2);
          if (lane < a_.num_topk) {
            const Place place = reinterpret_cast<const Place*>(stage + places_at_)[lane];
            row = row_at(heard, source, place.expert, place.index);
            weight = place.weight;
          }
          place_row(stage, row);
        }
      }
      write_slot(i, row, weight);
    }
    bulk_wait<0>();
  }

  // Of a whole warp: a record to the rows of all lanes.
  __device__ void place_row(const char* stage, int64_t row) const {
    if (row >= 0) {
      bulk_store(a_.rows + row * a_.row_bytes, stage, a_.row_bytes);
    }
    bulk_commit();
#pragma unroll 1
    for (uint32_t left = a_.num_scales != 0 ? __ballot_sync(kFullWarp, row >= 0) : 0; left != 0; left &= left - 1) {
      int* scales = scales_of(__shfl_sync(kFullWarp, row, __ffs(static_cast<int>(left)) - 1));
#pragma unroll 1
      for (int j = lane_id(); j < a_.num_scales; j += kWarp) {
        scales[j * a_.scale_rows] = reinterpret_cast<const int*>(stage + scales_at_)[j];
      }
    }
    __syncwarp();  // all have read the stage
  }

  const LowLatencyDispatchArgs& a_;
  const LowLatencyShape& shape_;
  const Flight& f_;
  const LowLatencyMemory& memory_;
  const int loads_;
  const int num_local_;
  const int scales_at_, places_at_, record_bytes_;
};

}  // namespace ep::cuda
