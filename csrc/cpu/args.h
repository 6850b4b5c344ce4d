// The CPU ops: what one chunk of work needs, and the builds of it for several instruction sets.
//
// Each op runs over all chunks of all rows, whatever their dtypes, and writes a partial sum per chunk where it sums.
#pragma once

#include "../core/formulas.h"
#include "../core/masks.h"
#include "../core/rounding.h"
#include "../core/table.h"

namespace looksam::cpu {

inline constexpr int kMaxOperands = 5;
inline constexpr int kMaxPairs = 8;

// How an op uses the memory: of influence on its speed only. Processors differ in what they want.
struct MemoryUse {
  static constexpr int kPlaces = 4;

  bool ahead = false;    // are later tiles asked for by instructions, and chunks of sums read from kPlaces in turns?
  bool streams = false;  // is what nothing reads soon (backup, q, w from the backup) written past the caches?

  int places() const { return ahead ? kPlaces : 1; }
};

// One side of an inner product: a column, or T times it.
struct Operand {
  Column column;
  bool adaptive;
};

struct SumsArgs {
  ChunkMap map;
  MemoryUse memory;
  Column w;
  const double* eta;      // [rows], NaN where T = 1; null: everywhere
  const double* numbers;  // [4, rows] of a Preconditioner, whose T is then taken; null: none
  Column v;               // its second moment
  int gradient;           // the operand whose column is g
  int operands;
  Operand operand[kMaxOperands];
  int pairs;
  int x[kMaxPairs], y[kMaxPairs];  // operand indices
  double* partial;                 // [pairs, chunks], 0 where an operand is absent
};

// In the rows that have the first input: b <- w unless they start from b, then w <- origin + T^2 sum_i c_i x_i in the
// elements that the mask keeps; with a preconditioner w <- origin + T sum_i c_i x_i, its g the first input.
struct PerturbArgs {
  ChunkMap map;
  MemoryUse memory;
  Column w, b;
  const unsigned char* from_b;  // [rows], 1 where b is the origin: w is perturbed already, or b is its master copy
  const double *eta, *numbers;  // as in SumsArgs
  Column v;
  int inputs;
  Column input[kMaxInputs];
  const double* c;  // [inputs, rows]
  Mask mask;
  const Rounding* rounding;  // [rows]; null: everywhere to nearest
};

enum class Action : std::uint8_t { skip, restore, update };

struct StepRow {
  Action action;
  bool from_b;  // as in PerturbArgs
  double trust_ratio;
  UpdateScalars<double> scalars;
  Rounding rounding;
};

// d = sum_i d_i x_i, the base update, w += sum_i post_i x_i, written <- sum_i q_i x_i. grad writes d over the first
// input instead of updating. A combination without coefficients is left out.
struct StepArgs {
  ChunkMap map;
  MemoryUse memory;
  Base base;
  const StepRow* row;  // [rows]
  int inputs;
  Column input[kMaxInputs];
  const double *d, *q, *post;  // [inputs, rows]
  Column w, b, written;
  Column state[kMaxStates];  // those of the base, in the order of its struct
  double* q_sq;              // [chunks], partial sums of ||q_p||^2
  double *w_sq, *u_sq;       // [chunks], lamb's of ||w_p||^2 and ||u_p||^2
  void* u;                   // of the one row of lamb that is under way, in the type of the arithmetic
};

// Each function works on the chunks first .. last - 1.
struct Kernels {
  const char* name;
  void (*sums)(const SumsArgs&, std::int64_t first, std::int64_t last);
  void (*perturb)(const PerturbArgs&, std::int64_t first, std::int64_t last);
  // The whole update; of lamb the first phase: all but w and post.
  void (*step)(const StepArgs&, std::int64_t first, std::int64_t last);
  // lamb's second phase, last chunk first, which is the one still in cache: w from u and trust ratio, and post.
  void (*lamb_apply)(const StepArgs&, std::int64_t first, std::int64_t last);
};

// Is b the master copy of w, rather than a place to save it in?
LOOKSAM_HD bool is_master(const Column& b, const Column& w, std::int64_t row) {
  return b.has(row) && b.dtype[row] != w.dtype[row];
}

// Sums of rows of double storage are of double operands.
LOOKSAM_HD bool in_double(const Column& w, std::int64_t row) { return w.dtype[row] == Dtype::f64; }

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
