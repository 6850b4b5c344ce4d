// Stochastic rounding of new weights to bfloat16: the twin of looksam_kernels/rounding.py.
#pragma once

#include "masks.h"

namespace looksam {

// Of one row's weights in one op. A row that has a master copy, or is not of bfloat16, is rounded to nearest.
struct Rounding {
  std::uint32_t key;
  bool stochastic;
};

enum class WrittenBy : std::uint32_t { perturb = 1, step = 2 };

// key: of the seed. updates: how many the row will have had with the one that is under way.
LOOKSAM_HD std::uint32_t rounding_key(std::uint32_t key, WrittenBy op, double updates) {
  return mix(mix(key ^ static_cast<std::uint32_t>(op)) ^ static_cast<std::uint32_t>(updates));
}

// x moved to one of the two bfloat16 numbers around it, which the storing then keeps as it is: to the one further from
// 0 with the probability (x - nearer) / (further - nearer), in steps of 2^-16, so that the mean is x. From the largest
// bfloat16 on, and if it is infinite or NaN, x stays: it is rounded to nearest.
LOOKSAM_HD float stochastically_rounded(float x, std::uint32_t hash) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t moved = (bits + (hash >> 16)) & 0xffff0000u;
  return float_of((bits & 0x7fffffffu) >= 0x7f7f0000u ? bits : moved);
}
// What is computed in double is float64, or has a master copy.
LOOKSAM_HD double stochastically_rounded(double x, std::uint32_t) { return x; }

}  // namespace looksam
