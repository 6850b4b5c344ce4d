// The CPU ops over a whole table, each one parallel region (lamb: one more pair for every row too large for the cache).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "args.h"

namespace looksam::cpu {

// Calls body(first, last) for parts of 0 .. count - 1 that together cover it, on any threads, none smaller than `grain`
// but the last.
using Body = std::function<void(std::int64_t first, std::int64_t last)>;
using ParallelFor = std::function<void(std::int64_t count, std::int64_t grain, const Body& body)>;

// values[p, row] = sum of x y over the row's elements, for each pair p of args; args.partial is made here.
void sums(SumsArgs args, double* values, const ParallelFor& parallel_for);

void perturb(const PerturbArgs& args, const ParallelFor& parallel_for);

// rows[r].trust_ratio, and the three arrays of partial sums, are made here. q_sq_of_row [rows] receives ||q_p||^2 of
// the rows that are updated; null where q is not written. base_of_row: each row's hyper-parameters, read by lamb only.
void step(StepArgs args, StepRow* rows, const BaseHyper* const* base_of_row, double* q_sq_of_row,
          const ParallelFor& parallel_for);

// Inner products <x, y> of some pairs of columns, [x.size(), rows], with the loss scale that the gradients carry.
struct SumsOfRows {
  std::vector<Col> x, y;
  std::vector<const double*> values;  // of each pair, [rows]
};

// The coefficients of a rule for every row, each [rule.inputs, rows]; q and post may be null. lars: each row's
// hyper-parameters, and where the trust ratios go, [rows]; null where the base is another.
void coefficients(const RuleInfo& rule, const SumsOfRows& sums, const RowHyper* const* hyper, const CommonHyper& common,
                  bool found_inf, std::int32_t rows, double* d, double* q, double* post, const LarsHyper* const* lars,
                  double* trust);

// The instruction sets that this processor runs, best last, and the one in use; use_isa returns false for another name.
const std::vector<const Kernels*>& available_isas();
const Kernels& isa();
bool use_isa(const std::string& name);

}  // namespace looksam::cpu
