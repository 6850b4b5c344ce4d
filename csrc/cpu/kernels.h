// The CPU ops: what one chunk of work needs, and the builds of it for several instruction sets.
//
// Each op runs over all chunks of all rows, whatever their dtypes, and writes a partial sum per chunk where it sums.
#pragma once

#include "../core/scalars.h"
#include "../core/table.h"

namespace looksam::cpu {

inline constexpr int kMaxOperands = 5;
inline constexpr int kMaxPairs = 8;

// One side of an inner product: a column, or T times it.
struct Operand {
  Column column;
  bool adaptive;
};

struct SumsArgs {
  ChunkMap map;
  Column w;
  const double* eta;  // [rows], NaN where T = 1; null: everywhere
  int operands;
  Operand operand[kMaxOperands];
  int pairs;
  int x[kMaxPairs], y[kMaxPairs];  // operand indices
  double* partial;                 // [pairs, chunks], 0 where an operand is absent
};

// b <- w, w <- w + c T^2 x in the rows that have an x; where b is a master copy it is read and not written.
struct PerturbArgs {
  ChunkMap map;
  Column w, b, x;
  const double* eta;
  const double* c;  // [rows]
};

enum class Action : std::uint8_t { skip, restore, update };

struct StepRow {
  Action action;
  bool from_b;  // the step starts from b: w is perturbed, or b is its master copy
  double trust_ratio;
  UpdateScalars<double> scalars;
};

// d = sum_i d_i x_i, q <- sum_i q_i x_i, and the base update. grad writes d over the first input.
struct StepArgs {
  ChunkMap map;
  Base base;
  const StepRow* row;  // [rows]
  int inputs;
  Column input[kMaxInputs];
  const double* d_coefficient;  // [inputs, rows]
  const double* q_coefficient;  // null: q is not written
  Column w, b, q;
  Column first_state, second_state;  // momentum_buffer, or exp_avg and exp_avg_sq
  double* q_sq;                      // [chunks]
  double *w_sq, *u_sq;               // [chunks], lamb
};

// Each function works on the chunks first .. last - 1.
struct Kernels {
  const char* name;
  void (*sums)(const SumsArgs&, std::int64_t first, std::int64_t last);
  void (*perturb)(const PerturbArgs&, std::int64_t first, std::int64_t last);
  // The whole update; of lamb the first phase: d, q, moments and the squares of w and u.
  void (*step)(const StepArgs&, std::int64_t first, std::int64_t last);
  // lamb's second phase, last chunk first, which is the one still in cache: w from the moments and the trust ratio.
  void (*lamb_apply)(const StepArgs&, std::int64_t first, std::int64_t last);
};

// Is b the master copy of w, rather than a place to save it in?
LOOKSAM_HD bool is_master(const Column& b, const Column& w, std::int64_t row) {
  return b.has(row) && b.dtype[row] != w.dtype[row];
}

// Rows of double storage, or with a double master copy, are computed in double.
LOOKSAM_HD bool in_double(const Column& w, const Column& b, std::int64_t row) {
  return w.dtype[row] == Dtype::f64 || (b.has(row) && b.dtype[row] == Dtype::f64);
}

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
#endif

}  // namespace looksam::cpu
