#include "ops.h"

#include <numeric>

#include "memory.h"

namespace looksam::cpu {

namespace {

constexpr std::int64_t kGrain = 32768;  // elements; for fewer a second thread costs more than it brings

// The same in units of work, chunks or rows, of which `units` have `elements` together.
std::int64_t grain(std::int64_t units, std::int64_t elements) {
  return elements > 0 ? 1 + kGrain * units / elements : units;
}

std::int64_t grain(const ChunkMap& map) {
  return grain(map.chunks, std::accumulate(map.numel, map.numel + map.rows, std::int64_t{0}));
}

// Rows of at most this many chunks do both phases of lamb on one thread, so that w and u of the row (8 bytes an
// element, half a MiB) are still in its second-level cache. Depends on sizes only, as all that decides an order of
// sums.
constexpr std::int64_t kCachedChunks = 8;

template <class Args>
void in_chosen_way(MemoryChoice& choice, void (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& args,
                   std::int64_t first, std::int64_t last) {
  Args own = args;
  choice.over(args.map, first, last, [&](std::int64_t from, std::int64_t to, MemoryUse memory) {
    own.memory = memory;
    kernel(own, from, to);
  });
}

double total(const double* partial, const ChunkMap& map, std::int64_t row) {
  double sum = 0;
  for (std::int64_t i = map.first[row]; i < map.first[row + 1]; ++i) sum += partial[i];
  return sum;
}

// Memory of this thread for lamb's u. Kept: to be given fresh pages in every step takes longer than to fill them.
void* scratch_for_u(const StepArgs& args, std::int64_t row) {
  static thread_local std::vector<double> scratch;
  const auto bytes = static_cast<std::size_t>(args.map.numel[row]) * (in_double(args.w, args.b, row) ? 8 : 4);
  if (scratch.size() * sizeof(double) < bytes) scratch.resize(bytes / sizeof(double) + 1);
  return scratch.data();
}

void step_lamb(StepArgs args, StepRow* rows, const BaseHyper* const* base_of_row, const ParallelFor& parallel_for) {
  const Kernels& kernels = isa();
  const ChunkMap& map = args.map;
  const auto chunks_of = [&](std::int64_t row) { return map.first[row + 1] - map.first[row]; };
  const auto find_trust_ratio = [&](std::int64_t row) {
    if (rows[row].action == Action::update)
      rows[row].trust_ratio = trust_ratio(total(args.w_sq, map, row), total(args.u_sq, map, row), *base_of_row[row]);
  };
  args.memory = memory_choices().step.current();
  std::vector<std::int64_t> small, large;
  std::int64_t elements_of_small = 0;
  for (std::int64_t row = 0; row < map.rows; ++row) {
    const bool is_small = chunks_of(row) <= kCachedChunks;
    (is_small ? small : large).push_back(row);
    if (is_small) elements_of_small += map.numel[row];
  }
  const auto rows_of_small = static_cast<std::int64_t>(small.size());

  parallel_for(rows_of_small, grain(rows_of_small, elements_of_small), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t row = small[i];
      StepArgs own = args;
      own.u = scratch_for_u(args, row);
      kernels.step(own, map.first[row], map.first[row + 1]);
      find_trust_ratio(row);
      kernels.lamb_apply(own, map.first[row], map.first[row + 1]);
    }
  });
  for (const std::int64_t row : large) {
    const std::int64_t begin = map.first[row];
    args.u = scratch_for_u(args, row);
    parallel_for(chunks_of(row), kGrain / kChunk, [&](std::int64_t first, std::int64_t last) {
      in_chosen_way(memory_choices().step, kernels.step, args, begin + first, begin + last);
    });
    find_trust_ratio(row);
    parallel_for(chunks_of(row), kGrain / kChunk,
                 [&](std::int64_t first, std::int64_t last) { kernels.lamb_apply(args, begin + first, begin + last); });
  }
}

const Kernels*& selected_isa() {
  static const Kernels* selected = available_isas().back();
  return selected;
}

}  // namespace

const std::vector<const Kernels*>& available_isas() {
  static const std::vector<const Kernels*> available = [] {
    std::vector<const Kernels*> found = {&baseline};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) found.push_back(&avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&avx512);
#endif
    return found;
  }();
  return available;
}

const Kernels& isa() { return *selected_isa(); }

bool use_isa(const std::string& name) {
  for (const Kernels* kernels : available_isas()) {
    if (name != kernels->name) continue;
    selected_isa() = kernels;
    return true;
  }
  return false;
}

void sums(SumsArgs args, double* values, const ParallelFor& parallel_for) {
  const Kernels& kernels = isa();
  std::vector<double> partial(static_cast<std::size_t>(args.pairs * args.map.chunks));
  args.partial = partial.data();
  if (args.pairs > 0)
    parallel_for(args.map.chunks, grain(args.map), [&](std::int64_t first, std::int64_t last) {
      in_chosen_way(memory_choices().sums, kernels.sums, args, first, last);
    });
  for (std::int64_t p = 0; p < args.pairs; ++p)
    for (std::int64_t row = 0; row < args.map.rows; ++row)
      values[p * args.map.rows + row] = total(args.partial + p * args.map.chunks, args.map, row);
}

void perturb(const PerturbArgs& args, const ParallelFor& parallel_for) {
  const Kernels& kernels = isa();
  parallel_for(args.map.chunks, grain(args.map), [&](std::int64_t first, std::int64_t last) {
    in_chosen_way(memory_choices().perturb, kernels.perturb, args, first, last);
  });
}

void step(StepArgs args, StepRow* rows, const BaseHyper* const* base_of_row, double* q_sq_of_row,
          const ParallelFor& parallel_for) {
  const Kernels& kernels = isa();
  const auto chunks = static_cast<std::size_t>(args.map.chunks);
  const bool two_phases = in_two_phases(args.base);
  std::vector<double> q_sq(q_sq_of_row != nullptr ? chunks : 0), squares(two_phases ? 2 * chunks : 0);
  args.row = rows;
  args.q_sq = q_sq.data();
  args.w_sq = squares.data();
  args.u_sq = squares.data() + args.map.chunks;
  if (two_phases) {
    step_lamb(args, rows, base_of_row, parallel_for);
  } else {
    parallel_for(args.map.chunks, grain(args.map), [&](std::int64_t first, std::int64_t last) {
      in_chosen_way(memory_choices().step, kernels.step, args, first, last);
    });
  }
  for (std::int64_t row = 0; row < args.map.rows && q_sq_of_row != nullptr; ++row)
    if (rows[row].action == Action::update) q_sq_of_row[row] = total(args.q_sq, args.map, row);
}

void coefficients(const RuleInfo& rule, const SumsOfRows& given, const RowHyper* const* hyper,
                  const CommonHyper& common, bool found_inf, std::int32_t rows, double* d, double* q, double* post,
                  const LarsHyper* const* lars, double* trust) {
  std::vector<double> factor;
  Sums total = {}, of_row = {};
  for (std::size_t p = 0; p < given.values.size(); ++p) {
    factor.push_back(unscaling(given.x[p], given.y[p], common.inv_scale));
    double sum = 0;
    for (std::int32_t row = 0; row < rows; ++row) sum += given.values[p][row] * factor[p];
    total.set(given.x[p], given.y[p], sum);
  }
  const auto sums_of = [&](std::int32_t row) -> const Sums& {
    for (std::size_t p = 0; p < factor.size(); ++p)
      of_row.set(given.x[p], given.y[p], given.values[p][row] * factor[p]);
    return of_row;
  };
  const bool by_length = is_ascent(rule.rule) || common.max_grad_norm >= 0;
  std::vector<Direction> directions(static_cast<std::size_t>(rows));
  double square = 0;
  for (std::int32_t row = 0; row < rows; ++row) {
    const Sums& sums = sums_of(row);
    directions[row] = direction(rule.rule, sums, total, *hyper[row], common);
    if (by_length) square += direction_sq(rule, directions[row], sums);
  }
  for (std::int32_t row = 0; row < rows; ++row) {
    const Sums& sums = sums_of(row);
    const RowHyper& h = *hyper[row];
    double by = length(rule.rule, sums, total, h, common, square);
    if (lars != nullptr)
      by *= trust[row] = lars_ratio(sums.of(w, w), by * by * direction_sq(rule, directions[row], sums), *lars[row]);
    finish(rule, directions[row], by, h, common, found_inf);
    for (int i = 0; i < rule.inputs; ++i) {
      d[i * rows + row] = directions[row].d[i];
      if (q != nullptr) q[i * rows + row] = directions[row].q[i];
      if (post != nullptr) post[i * rows + row] = directions[row].post[i];
    }
  }
}

}  // namespace looksam::cpu
