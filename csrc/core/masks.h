// Random element masks from a counter, computed where they are used: the twin of looksam_kernels/masks.py.
#pragma once

#include "dtype.h"

namespace looksam {

// A bijection of 32 bits of which every bit depends on every other: the finaliser "lowbias32" (Wellons 2018).
LOOKSAM_HD std::uint32_t mix(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The hashes of a row's elements from one offset on, up to the next multiple of 2^32.
struct HashSpan {
  std::uint32_t key, first;

  LOOKSAM_HD HashSpan(std::uint32_t draw_key, std::int32_t row, std::int64_t offset)
      : key(mix(mix(draw_key ^ static_cast<std::uint32_t>(row)) ^ static_cast<std::uint32_t>(offset >> 32))),
        first(static_cast<std::uint32_t>(offset)) {}

  LOOKSAM_HD std::uint32_t hash(int i) const { return mix(mix((first + static_cast<std::uint32_t>(i)) ^ key) + key); }
};

struct Mask {
  std::uint32_t key;
  std::uint32_t threshold;  // 2^32 times the probability that an element is kept; 0: there is no mask

  LOOKSAM_HD bool present() const { return threshold != 0; }
};

struct MaskSpan : HashSpan {
  std::uint32_t threshold;

  LOOKSAM_HD MaskSpan(Mask mask, std::int32_t row, std::int64_t offset)
      : HashSpan(mask.key, row, offset), threshold(mask.threshold) {}

  LOOKSAM_HD bool keeps(int i) const { return hash(i) < threshold; }
};

}  // namespace looksam
