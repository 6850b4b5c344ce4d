// sums: inner products of pairs of columns per row, and the coefficients of a rule from them.
//
//   every block       a few chunks: the pairs' partial sums of each, stored by the chunk's index
//   last of a row     adds the row's partial sums up, in the order of its chunks
//   last of all       the totals over the rows, and the coefficients of every row (core/formulas.h)
#pragma once

#include <type_traits>

#include "block.cuh"
#include "table.cuh"

namespace looksam::cuda {

inline constexpr int kOperands = 3;
inline constexpr int kPairs = kOperands * (kOperands + 1) / 2;  // (0,0) (0,1) (0,2) (1,1) (1,2) (2,2)
inline constexpr int kFields = 12;

// Consecutive ones: what follows a chunk's elements is paid once for all. More would leave processors without a block
// at the end of a small model.
inline constexpr int kChunksABlock = 2;

LOOKSAM_HD constexpr int pair_of(int k, int l) { return k * kOperands - k * (k - 1) / 2 + l - k; }  // k <= l

// A sum that a rule reads, or that is only checked for being finite.
struct Field {
  const double* value;  // [rows]
  double* copy;         // [rows]; null: none is made
};

struct RuleArgs {
  bool evaluate;  // only the last launch of a table does
  RuleInfo rule;
  CommonHyper common;         // without inv_scale, which is 1 / grad_scale
  const float* grad_scale;    // null: 1
  const float* earlier_inf;   // found_inf of an earlier pass; null: 0
  std::int32_t rows;          // of the whole table
  const std::int32_t* group;  // [rows]
  std::int32_t fields;
  Field field[kFields];
  std::int8_t place[Sums::count];  // which field a sum is; negative: none
  double *d, *q, *post;            // [inputs, rows]; q and post are null where the rule has none
  float* found_inf;
};

// What Sums is to the functions of formulas.h: the fields of a rule where they lie, without the loss scale. Sums
// itself, indexed at run time, would take local or shared memory for every thread.
struct RowFields {
  const RuleArgs& rule;
  std::int32_t row;
  double inv_scale;

  LOOKSAM_HD double of(Col x, Col y) const {
    const int field = rule.place[Sums::index(x, y)];
    return field < 0 ? 0 : rule.field[field].value[row] * unscaling(x, y, inv_scale);
  }
};

struct TotalFields {
  const RuleArgs& rule;
  const double* total;
  double inv_scale;

  LOOKSAM_HD double of(Col x, Col y) const {
    const int field = rule.place[Sums::index(x, y)];
    return field < 0 ? 0 : total[field] * unscaling(x, y, inv_scale);
  }
};

struct SumsArgs {
  ChunkMap map;
  Rows rows;
  std::int32_t rows_here;  // with chunks in this launch
  std::int64_t chunks_here;
  std::int32_t operands;
  const Ref* operand[kOperands];
  Ref* passed_to;           // the operand that is passed in the arguments is written here; null: none is
  std::int32_t passed;      // which operand that is
  std::uint32_t stretched;  // bit k: operand k is T times its column
  const Ref* of_t;          // what T is made of: w; or, with a preconditioner, its second moment
  const double* eta;        // [rows], NaN where T = 1
  const double* numbers;    // [4, rows] of a preconditioner, whose g is operand 0; null: there is none
  double* value[kPairs];    // [rows] each; null where the pair is not asked for
  double* partial;          // [asked pairs, chunks]
  std::uint32_t *row_arrivals, *arrivals;
  const Ref *cached, *cached_if;  // scalars of type double that stand for a sum, in rows that have the other column too
  double* cached_value;           // [rows]; null: none asked for
  RuleArgs rule;
};

// kRows: of the column that is passed along. The rest of the bytes is for the groups.
template <int kRows, std::size_t kBytes>
struct SumsLaunch {
  static constexpr int rows = kRows;
  static constexpr int groups =
      static_cast<int>((kBytes / 8 * 8 - sizeof(SumsArgs) - sizeof(PassedColumn<kRows>)) / sizeof(RowHyper));

  SumsArgs args;
  RowHyper group[groups];
  PassedColumn<kRows> column;
};

using SmallSums = SumsLaunch<312, kShortArguments>;
using LargeSums = SumsLaunch<kMaxRows, kLongArguments>;
static_assert(sizeof(SmallSums) <= kShortArguments && sizeof(LargeSums) <= kLongArguments);
static_assert(SmallSums::groups >= 8 && LargeSums::groups >= 64);

template <class T, class Launch>
struct SumsBody {
  using Wide = typename T::Wide;
  // 64 registers are too few for the coefficients.
  static constexpr int kBlocksPerProcessor = T::blocks_per_processor < 3 ? T::blocks_per_processor : 3;

  struct Shared {
    BlockSums<kPairs> sums;
    double total[kFields], direction_sq;
  };

  template <class Block>
  LOOKSAM_HD static void run(const Block& block, Shared& shared, const Launch& launch) {
    const SumsArgs& a = launch.args;
    if (a.passed_to != nullptr)
      for (std::int64_t i = block.index() * block.size() + block.rank(); i < a.rows.count;
           i += block.count() * block.size())
        a.passed_to[a.rows.first + i] = launch.column.at(static_cast<std::int32_t>(i));

    bool last = a.rows_here == 0;
    const std::int64_t mine = block.index() * kChunksABlock;
    const std::int64_t end = mine + kChunksABlock < a.chunks_here ? mine + kChunksABlock : a.chunks_here;
    for (std::int64_t i = mine; i < end; ++i) {
      const std::int64_t index = a.rows.first_chunk + i;
      add_up(block, shared, launch, a.map.at(index), index);
    }
    for (std::int64_t i = mine; i < end;) {  // the rows of these chunks
      const std::int32_t row = a.map.row_of[a.rows.first_chunk + i];
      const std::int64_t row_begin = a.map.first[row], row_end = a.map.first[row + 1];
      const auto block_of = [&](std::int64_t chunk) { return (chunk - a.rows.first_chunk) / kChunksABlock; };
      i = row_end - a.rows.first_chunk;
      if (!last_to_arrive(block, &a.row_arrivals[row], block_of(row_end - 1) - block_of(row_begin) + 1)) continue;
      finish_row(block, shared, a, row, row_begin, row_end);
      last = last_to_arrive(block, a.arrivals, a.rows_here);
    }
    if (last) finish(block, shared, launch);
  }

 private:
  template <class Block>
  LOOKSAM_HD static void add_up(const Block& block, Shared& shared, const Launch& launch, const Chunk& chunk,
                                std::int64_t index) {
    const SumsArgs& a = launch.args;
    const auto span = [&](int k) {
      if (k >= a.operands) return Span<T>({0}, 0);
      const bool passed = a.passed_to != nullptr && k == a.passed;
      return Span<T>(passed ? launch.column.at(chunk.row - a.rows.first) : a.operand[k][chunk.row], chunk.offset);
    };
    const Span<T> x[kOperands] = {span(0), span(1), span(2)};
    const bool preconditioned = a.numbers != nullptr;
    const double eta = a.stretched != 0 && !preconditioned ? a.eta[chunk.row] : 0;
    const bool scaled = a.stretched != 0 && (preconditioned ? x[0].present() : eta == eta);
    const Span<T> of_t(scaled ? a.of_t[chunk.row] : Ref{0}, chunk.offset);
    bool aligned = of_t.aligned();
    for (int k = 0; k < kOperands; ++k) aligned = aligned && x[k].aligned();

    Wide sum[kPairs] = {};
    struct Loaded {
      Raw<T> x[kOperands], of_t;
    };
    const auto load = [&](int i, int size, auto is_whole) {
      constexpr bool kWhole = decltype(is_whole)::value;
      return Loaded{{x[0].template load<kWhole>(i, size), x[1].template load<kWhole>(i, size),
                     x[2].template load<kWhole>(i, size)},
                    of_t.template load<kWhole>(i, size)};
    };
    for_each_two_vectors<T>(block, chunk.size, aligned, load, [&](const Loaded& loaded) {
      Vector<T> value[kOperands];
      for (int k = 0; k < kOperands; ++k) value[k] = loaded.x[k].values();
      if (scaled && preconditioned) {
        const Preconditioner<Wide> p(a.numbers, a.map.rows, chunk.row);
        Vector<T> root = loaded.of_t.values();
        for (int lane = 0; lane < T::lanes; ++lane) root.lane[lane] = p.root(value[0].lane[lane], root.lane[lane]);
        for (int k = 0; k < kOperands; ++k)
          for (int lane = 0; lane < T::lanes; ++lane)
            if (a.stretched >> k & 1) value[k].lane[lane] = over_root(value[k].lane[lane], root.lane[lane]);
      } else if (scaled) {
        const Vector<T> weight = loaded.of_t.values();
        for (int k = 0; k < kOperands; ++k)
          for (int lane = 0; lane < T::lanes; ++lane)
            if (a.stretched >> k & 1) value[k].lane[lane] *= adaptive_scale(weight.lane[lane], static_cast<Wide>(eta));
      }
      for (int k = 0; k < kOperands; ++k)
        for (int l = 0; l < kOperands; ++l)
          if (l >= k && a.value[pair_of(k, l)] != nullptr)
            for (int lane = 0; lane < T::lanes; ++lane) sum[pair_of(k, l)] += value[k].lane[lane] * value[l].lane[lane];
    });

    int asked = 0;
    for (int pair = 0; pair < kPairs; ++pair)
      if (a.value[pair] != nullptr) shared.sums.put(block, asked++, static_cast<double>(sum[pair]));
    const double total = shared.sums.totals(block, asked);
    if (block.rank() < asked) a.partial[block.rank() * a.map.chunks + index] = total;
    if (asked > 1) block.barrier();  // thread 0 is to publish what the others have written
  }

  template <class Block>
  LOOKSAM_HD static void finish_row(const Block& block, Shared& shared, const SumsArgs& a, std::int32_t row,
                                    std::int64_t begin, std::int64_t end) {
    const double* partial = a.partial;
    double* mine = nullptr;
    int asked = 0;
    for (int pair = 0; pair < kPairs; ++pair) {
      if (a.value[pair] == nullptr) continue;
      if (block.rank() == asked) mine = a.value[pair];
      double sum = 0;
      for (std::int64_t i = begin + block.rank(); i < end; i += block.size()) sum += partial[i];
      shared.sums.put(block, asked++, sum);
      partial += a.map.chunks;
    }
    const double total = shared.sums.totals(block, asked);
    if (mine != nullptr) mine[row] = total;
    if (asked > 1) block.barrier();  // as above
  }

  template <class Block>
  LOOKSAM_HD static void finish(const Block& block, Shared& shared, const Launch& launch) {
    const SumsArgs& a = launch.args;
    if (a.cached_value != nullptr) {
      for (std::int32_t row = block.rank(); row < a.rule.rows; row += block.size()) {
        const Ref value = at(a.cached, row);
        const bool counts = value.present() && at(a.cached_if, row).present();
        a.cached_value[row] = counts ? *reinterpret_cast<const double*>(value.data()) : 0;
      }
      block.barrier();
    }
    if (a.rule.evaluate) evaluate(block, shared, a.rule, launch.group);
  }

  template <class Block>
  LOOKSAM_HD static void evaluate(const Block& block, Shared& shared, const RuleArgs& r, const RowHyper* group) {
    CommonHyper common = r.common;
    common.inv_scale = r.grad_scale != nullptr ? 1.0 / static_cast<double>(*r.grad_scale) : 1;

    for (int first = 0; first < r.fields; first += kPairs) {
      const int count = r.fields - first < kPairs ? r.fields - first : kPairs;
      for (int k = 0; k < count; ++k) {
        const Field& field = r.field[first + k];
        double sum = 0;
        for (std::int32_t row = block.rank(); row < r.rows; row += block.size()) {
          const double value = field.value[row];
          sum += value;
          if (field.copy != nullptr) field.copy[row] = value;
        }
        shared.sums.put(block, k, sum);
      }
      const double total = shared.sums.totals(block, count);
      if (block.rank() < count) shared.total[first + block.rank()] = total;
    }
    block.barrier();
    bool found_inf = r.earlier_inf != nullptr && *r.earlier_inf > 0;
    for (int f = 0; f < r.fields; ++f)
      found_inf = found_inf || shared.total[f] - shared.total[f] != 0;  // of infinity and NaN it is NaN

    const TotalFields total = {r, shared.total, common.inv_scale};
    // The directions wait in their places for the length, which depends on all of them.
    double square = 0;
    for (std::int32_t row = block.rank(); row < r.rows; row += block.size()) {
      const RowFields fields = {r, row, common.inv_scale};
      const Direction direction = looksam::direction(r.rule.rule, fields, total, group[r.group[row]], common);
      for (int i = 0; i < kMaxInputs; ++i) {
        if (i >= r.rule.inputs) continue;
        const std::int64_t place = static_cast<std::int64_t>(i) * r.rows + row;
        r.d[place] = direction.d[i];
        if (r.q != nullptr) r.q[place] = direction.q[i];
        if (r.post != nullptr) r.post[place] = direction.post[i];
      }
      square += direction_sq(r.rule, direction, fields);
    }
    shared.sums.put(block, 0, square);
    square = shared.sums.totals(block, 1);
    if (block.rank() == 0) shared.direction_sq = square;
    block.barrier();
    for (std::int32_t row = block.rank(); row < r.rows; row += block.size()) {
      const RowHyper& h = group[r.group[row]];
      const double l = length(r.rule.rule, RowFields{r, row, common.inv_scale}, total, h, common, shared.direction_sq);
      for (int i = 0; i < r.rule.inputs; ++i) {
        const std::int64_t place = static_cast<std::int64_t>(i) * r.rows + row;
        double d = r.d[place], q = r.q != nullptr ? r.q[place] : 0, post = r.post != nullptr ? r.post[place] : 0;
        looksam::finish(r.rule, i, d, q, post, l, h, common, found_inf);
        r.d[place] = d;
        if (r.q != nullptr) r.q[place] = q;
        if (r.post != nullptr) r.post[place] = post;
      }
    }
    if (block.rank() == 0) *r.found_inf = found_inf ? 1.0f : 0.0f;
  }
};

inline constexpr int kLarsGroups = 64;

// A launch of its own: in the epilogue above it would cost every sum registers. d as the rule has left it: of inputs as
// they are, loss scale and all, as the sums are.
struct LarsArgs {
  RuleArgs rule;
  double* trust;  // [rows]
  LarsHyper group[kLarsGroups];
};
static_assert(sizeof(LarsArgs) <= kShortArguments);

// The trust ratio of each row, and d times it.
struct LarsBody {
  static constexpr int kBlocksPerProcessor = 1;
  struct Shared {};

  template <class Block>
  LOOKSAM_HD static void run(const Block& block, Shared&, const LarsArgs& a) {
    const RuleArgs& r = a.rule;
    const std::int64_t row = block.index() * block.size() + block.rank();
    if (row >= r.rows) return;
    double w_norm_sq = 0, d_norm_sq = 0;
    for (int f = 0; f < r.fields; ++f) {
      const double value = r.field[f].value[row];
      if (r.place[Sums::index(w, w)] == f) w_norm_sq = value;
      for (int i = 0; i < r.rule.inputs; ++i)
        for (int j = 0; j < r.rule.inputs; ++j)
          if (r.place[Sums::index(r.rule.input[i], r.rule.input[j])] == f)
            d_norm_sq += r.d[i * static_cast<std::int64_t>(r.rows) + row] *
                         r.d[j * static_cast<std::int64_t>(r.rows) + row] * value;
    }
    const double trust = lars_ratio(w_norm_sq, d_norm_sq, a.group[r.group[row]]);
    a.trust[row] = trust;
    for (int i = 0; i < r.rule.inputs; ++i) r.d[i * static_cast<std::int64_t>(r.rows) + row] *= trust;
  }
};

}  // namespace looksam::cuda
