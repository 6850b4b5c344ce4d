// step: d = sum_i d_i x_i and the base update in one pass, read from the backup where there is one, so that the restore
// is free; on the way the second combination, and what is added after the update. LAMB's w needs ||w_p|| and ||u_p||
// first, so its update is this pass without w, and a second one that computes u again.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "table.cuh"

namespace looksam::cuda {

struct StepGroup {
  BaseHyper hyper;
  Ref lr;  // a scalar on the device in place of hyper.lr; narrow: float, else double
};

struct StepTable {
  ChunkMap map;
  Rows rows;
  Base base;
  std::int32_t inputs;
  const Ref* input[kMaxInputs];  // null input[0]: perturbed rows are restored, nothing else happens
  const double *d, *q, *post;    // [inputs, rows of the whole table]; q and post may be null
  const float* found_inf;        // above 0: perturbed rows are restored, nothing else happens
  const Ref *w, *b;
  const Ref* state[kMaxStates];  // those of the base, in the order of its struct
  const Ref* count;              // scalars of type float
  const Ref* written;            // receives the second combination
  const Ref* written_norm_sq;    // scalars of type double; may be null
  double* partial;               // [sums, chunks]: squares of the second combination, of w, of u, where asked for
  std::uint32_t* row_arrivals;
  const double* trust;        // lars' ratios, [rows of the whole table]; null: the base is another
  double* trust_ratio;        // lamb's, likewise
  const std::int32_t* group;  // [rows of the whole table]
  std::uint32_t rounding_key;
  bool rounds_stochastically;
  Bits perturbed;
};

// How many groups one launch takes: the rest of its bytes.
inline constexpr int kStepGroups = static_cast<int>((kShortArguments - sizeof(StepTable) - 8) / sizeof(StepGroup));

struct StepArgs : StepTable {
  std::int32_t first_group;
  StepGroup groups[kStepGroups];
};
static_assert(sizeof(StepArgs) <= kShortArguments && kStepGroups >= 16);

// Where a row's step starts, and where it goes.
template <class T>
struct StepRow {
  Span<T> w, b;
  bool perturbed, master, from_b;
  Span<T> origin;  // one of both

  LOOKSAM_HD StepRow(const StepArgs& a, const Chunk& chunk)
      : w(a.w[chunk.row], chunk.offset),
        b(at(a.b, chunk.row), chunk.offset),
        perturbed(a.perturbed.has(chunk.row - a.rows.first)),
        master(b.present() && b.narrow() != w.narrow()),
        from_b(perturbed || master),
        origin(from_b ? a.b[chunk.row] : a.w[chunk.row], chunk.offset) {}

  // Without a master copy.
  LOOKSAM_HD bool bfloat16() const { return has_bfloat16<T> && w.narrow() && !master; }

  template <class Block>
  LOOKSAM_HD void restore(const Block& block, const Chunk& chunk) const {
    for_each_vector<T>(block, chunk.size, w.aligned() && b.aligned(), [&](int i, int size, bool whole) {
      if (whole) {
        w.template store<true>(i, size, b.template load<true>(i, size).values());
      } else {
        w.template store<false>(i, size, b.template load<false>(i, size).values());
      }
    });
  }
};

template <class T, int kSums>
struct StepShared {
  using Wide = typename T::Wide;
  BlockSums<kSums> sums;
  double total[kSums];
  UpdateScalars<Wide> scalars;
  Rounding rounding;
};

LOOKSAM_HD StepGroup group_of(const StepArgs& a, std::int32_t row) {
  StepGroup group = a.groups[a.group[row] - a.first_group];
  if (group.lr.present())
    group.hyper.lr = group.lr.narrow() ? static_cast<double>(*reinterpret_cast<const float*>(group.lr.data()))
                                       : *reinterpret_cast<const double*>(group.lr.data());
  return group;
}

LOOKSAM_HD float* count_of(const StepArgs& a, std::int32_t row) {
  return reinterpret_cast<float*>(a.count[row].data());
}

// The scalars of a row's update, and the rounding of its weights: made by one thread for all. updates: how many the row
// has had, this one included.
template <class Shared, class Block>
LOOKSAM_HD const auto& scalars_of(const Block& block, Shared& shared, const StepArgs& a, std::int32_t row,
                                  bool of_bfloat16, int updates_to_come) {
  if (block.rank() == 0) {
    const double updates = static_cast<double>(*count_of(a, row)) + updates_to_come;
    const double trust = a.trust != nullptr ? a.trust[row] : 1;
    shared.scalars = base_scalars(group_of(a, row).hyper, updates, trust).template to<typename Shared::Wide>();
    shared.rounding = {rounding_key(a.rounding_key, WrittenBy::step, updates), of_bfloat16 && a.rounds_stochastically};
  }
  block.barrier();
  return shared.scalars;
}

// Update: a base of core/updates.h; GradRunsAs for grad too.
template <class T, class Update>
struct StepBody {
  using Wide = typename T::Wide;
  // At 64 registers it spills on sm_100; this leaves it 80, or 128 with three states or more, or 255 with as many in
  // two packs (128 spill on sm_80).
  static constexpr int kMostBlocks = states_of<Update> < 3 ? 3 : states_of<Update> * T::lanes < 24 ? 2 : 1;
  static constexpr int kBlocksPerProcessor =
      T::blocks_per_processor < kMostBlocks ? T::blocks_per_processor : kMostBlocks;
  static constexpr int kSums = Update::two_phases ? 3 : 1;
  using Shared = StepShared<T, kSums>;

  template <class Block>
  LOOKSAM_HD static void run(const Block& block, Shared& shared, const StepArgs& a) {
    const std::int64_t index = a.rows.first_chunk + block.index();
    const Chunk chunk = a.map.at(index);
    const StepRow<T> row(a, chunk);
    const bool keep = a.input[0] == nullptr || *a.found_inf > 0 || !a.input[0][chunk.row].present();
    if (keep) {
      if (row.perturbed) row.restore(block, chunk);
      return;
    }
    update(block, shared, a, row, chunk, index);
    if (a.base == Base::grad && a.q == nullptr) return;
    const std::int64_t begin = a.map.first[chunk.row], end = a.map.first[chunk.row + 1];
    if (last_to_arrive(block, &a.row_arrivals[chunk.row], end - begin))
      finish_row(block, shared, a, chunk.row, begin, end);
  }

 private:
  struct Squares {
    Wide written, w, u;
  };

  template <class Block>
  LOOKSAM_HD static void update(const Block& block, Shared& shared, const StepArgs& a, const StepRow<T>& row,
                                const Chunk& chunk, std::int64_t index) {
    const Combination<T> direction(a.d, a.inputs, a.map.rows, chunk.row), second(a.q, a.inputs, a.map.rows, chunk.row),
        post(!Update::two_phases ? a.post : nullptr, a.inputs, a.map.rows, chunk.row);
    const auto input = [&](int i) {
      const bool needed = direction.c[i] != 0 || second.c[i] != 0 || post.c[i] != 0;
      return Span<T>(i < a.inputs && needed ? at(a.input[i], chunk.row) : Ref{0}, chunk.offset);
    };
    const Span<T> x[kMaxInputs] = {input(0), input(1), input(2)};
    const Span<T> written(a.q != nullptr ? a.written[chunk.row] : Ref{0}, chunk.offset);
    const bool updates = !std::is_same<Update, GradRunsAs>::value || a.base != Base::grad;
    const Span<T> output(updates ? Ref{0} : a.input[0][chunk.row], chunk.offset);
    // They stay in shared memory: in registers they would leave too few.
    const UpdateScalars<Wide>& h =
        updates ? scalars_of(block, shared, a, chunk.row, row.bfloat16(), 1) : shared.scalars;
    const auto state_of_row = [&](int k) {
      return StateSpan<T>(updates && has_state<Update>(k, h) ? a.state[k][chunk.row] : Ref{0}, chunk.offset);
    };
    const StateSpan<T> state[kMaxStates] = {state_of_row(0), state_of_row(1), state_of_row(2), state_of_row(3)};
    const bool aligned = x[0].aligned() && x[1].aligned() && x[2].aligned() && row.w.aligned() && row.b.aligned() &&
                         written.aligned() && output.aligned() && state[0].aligned() && state[1].aligned() &&
                         state[2].aligned() && state[3].aligned();
    const bool adds = updates && !post.is_zero();

    Squares square = {};
    for_each_vector<T>(block, chunk.size, aligned, [&](int i, int size, bool whole) {
      struct Loaded {
        Raw<T> x[kMaxInputs], w, state[kMaxStates];
      };
      const auto load = [&](auto is_whole) {
        constexpr bool kWhole = decltype(is_whole)::value;
        Loaded loaded = {{x[0].template load<kWhole>(i, size), x[1].template load<kWhole>(i, size),
                          x[2].template load<kWhole>(i, size)},
                         row.origin.template load<kWhole>(i, size),
                         {}};
        for (int k = 0; k < states_of<Update>; ++k) loaded.state[k] = state[k].template load<kWhole>(i, size);
        return loaded;
      };
      const Loaded loaded = whole ? load(std::true_type{}) : load(std::false_type{});

      const Vector<T> inputs[kMaxInputs] = {loaded.x[0].values(), loaded.x[1].values(), loaded.x[2].values()};
      if (written.present()) {
        const Vector<T> q = second.of(inputs);
        for (int k = 0; k < T::lanes; ++k) square.written += q.lane[k] * q.lane[k];
        whole ? written.template store<true, Cache::stream>(i, size, q) : written.template store<false>(i, size, q);
      }
      const Vector<T> d = direction.of(inputs), added = post.of(inputs);
      Vector<T> weight = loaded.w.values();
      Vector<T> s[kMaxStates] = {loaded.state[0].values(), loaded.state[1].values(), loaded.state[2].values(),
                                 loaded.state[3].values()};
      for (int k = 0; k < T::lanes; ++k) {
        Wide& w_k = weight.lane[k];
        if (!updates) continue;
        const Wide result =
            update_of<Update>(w_k, d.lane[k], s[0].lane[k], s[1].lane[k], s[2].lane[k], s[3].lane[k], h);
        if (Update::two_phases) {
          square.w += w_k * w_k;
          square.u += result * result;
        } else {
          w_k = result;
        }
        if (adds) w_k += added.lane[k];
      }
      if (updates && !Update::two_phases) round_stochastically<T>(weight, shared.rounding, chunk, i);

      const auto store = [&](auto is_whole) {
        constexpr bool kWhole = decltype(is_whole)::value;
        if (output.present()) output.template store<kWhole>(i, size, d);
        for (int k = 0; k < states_of<Update>; ++k)
          if (state[k].present()) state[k].template store<kWhole>(i, size, s[k]);
        if (Update::two_phases) return;
        if (updates || row.from_b) row.w.template store<kWhole>(i, size, weight);
        if (updates && row.master) row.b.template store<kWhole>(i, size, weight);
      };
      whole ? store(std::true_type{}) : store(std::false_type{});
    });

    const int count = sums_of(a);
    if (count == 0) return;
    if (a.q != nullptr) shared.sums.put(block, 0, static_cast<double>(square.written));
    if (Update::two_phases) {
      shared.sums.put(block, count - 2, static_cast<double>(square.w));
      shared.sums.put(block, count - 1, static_cast<double>(square.u));
    }
    const double total = shared.sums.totals(block, count);
    if (block.rank() < count) a.partial[block.rank() * a.map.chunks + index] = total;
    if (count > 1) block.barrier();  // thread 0 is to publish what the others have written
  }

  // Of the second combination, if there is one; then, in two phases, of w and u.
  LOOKSAM_HD static int sums_of(const StepArgs& a) { return (a.q != nullptr ? 1 : 0) + (Update::two_phases ? 2 : 0); }

  // All blocks of the row have read its update count.
  template <class Block>
  LOOKSAM_HD static void finish_row(const Block& block, Shared& shared, const StepArgs& a, std::int32_t row,
                                    std::int64_t begin, std::int64_t end) {
    const int count = sums_of(a);
    for (int k = 0; k < count; ++k) {
      double sum = 0;
      for (std::int64_t i = begin + block.rank(); i < end; i += block.size()) sum += a.partial[k * a.map.chunks + i];
      shared.sums.put(block, k, sum);
    }
    const double total = count > 0 ? shared.sums.totals(block, count) : 0;
    if (block.rank() < count) shared.total[block.rank()] = total;
    block.barrier();
    if (block.rank() != 0) return;
    const Ref norm_sq = at(a.written_norm_sq, row);
    if (a.q != nullptr && norm_sq.present()) *reinterpret_cast<double*>(norm_sq.data()) = shared.total[0];
    if (Update::two_phases)
      a.trust_ratio[row] =
          looksam::trust_ratio(shared.total[count - 2], shared.total[count - 1], group_of(a, row).hyper);
    if (a.base != Base::grad) *count_of(a, row) += 1;
  }
};

// The second pass of LAMB, last chunk first: that one is still in the cache.
template <class T>
struct LambBody {
  using Wide = typename T::Wide;
  static constexpr int kBlocksPerProcessor = T::blocks_per_processor;
  struct Shared {
    using Wide = typename T::Wide;
    UpdateScalars<Wide> scalars;
    Rounding rounding;
  };

  template <class Block>
  LOOKSAM_HD static void run(const Block& block, Shared& shared, const StepArgs& a) {
    const Chunk chunk = a.map.at(a.rows.first_chunk + block.count() - 1 - block.index());
    if (*a.found_inf > 0 || !a.input[0][chunk.row].present()) return;
    const StepRow<T> row(a, chunk);
    const Combination<T> post(a.post, a.inputs, a.map.rows, chunk.row);
    const auto input = [&](int i) {
      return Span<T>(post.c[i] != 0 ? at(a.input[i], chunk.row) : Ref{0}, chunk.offset);
    };
    const Span<T> x[kMaxInputs] = {input(0), input(1), input(2)};
    const StateSpan<T> m(a.state[0][chunk.row], chunk.offset), v(a.state[1][chunk.row], chunk.offset);
    const bool aligned = x[0].aligned() && x[1].aligned() && x[2].aligned() && row.w.aligned() && row.b.aligned() &&
                         m.aligned() && v.aligned();
    const UpdateScalars<Wide> h = scalars_of(block, shared, a, chunk.row, row.bfloat16(), 0);
    const bool adds = !post.is_zero();
    const Wide trust_ratio = static_cast<Wide>(a.trust_ratio[chunk.row]);

    for_each_vector<T>(block, chunk.size, aligned, [&](int i, int size, bool whole) {
      struct Loaded {
        Raw<T> x[kMaxInputs], w, m, v;
      };
      const auto load = [&](auto is_whole) {
        constexpr bool kWhole = decltype(is_whole)::value;
        return Loaded{{x[0].template load<kWhole>(i, size), x[1].template load<kWhole>(i, size),
                       x[2].template load<kWhole>(i, size)},
                      row.origin.template load<kWhole>(i, size),
                      m.template load<kWhole>(i, size),
                      v.template load<kWhole>(i, size)};
      };
      const Loaded loaded = whole ? load(std::true_type{}) : load(std::false_type{});

      const Vector<T> inputs[kMaxInputs] = {loaded.x[0].values(), loaded.x[1].values(), loaded.x[2].values()};
      const Vector<T> added = post.of(inputs), first = loaded.m.values(), variance = loaded.v.values();
      Vector<T> weight = loaded.w.values();
      for (int k = 0; k < T::lanes; ++k) {
        const auto u = Lamb::direction(weight.lane[k], first.lane[k], variance.lane[k], h);
        weight.lane[k] = Lamb::apply(weight.lane[k], u, trust_ratio, h);
        if (adds) weight.lane[k] += added.lane[k];
      }
      round_stochastically<T>(weight, shared.rounding, chunk, i);

      const auto store = [&](auto is_whole) {
        constexpr bool kWhole = decltype(is_whole)::value;
        row.w.template store<kWhole>(i, size, weight);
        if (row.master) row.b.template store<kWhole>(i, size, weight);
      };
      whole ? store(std::true_type{}) : store(std::false_type{});
    });
  }
};

}  // namespace looksam::cuda
