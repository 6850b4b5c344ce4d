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

struct Mask {
  std::uint32_t key;
  std::uint32_t threshold;  // 2^32 times the probability that an element is kept; 0: there is no mask

  LOOKSAM_HD bool present() const { return threshold != 0; }
};

// The mask from one offset of a row on, up to the next multiple of 2^32.
struct MaskSpan {
  std::uint32_t key, threshold, first;

  LOOKSAM_HD MaskSpan(Mask mask, std::int32_t row, std::int64_t offset)
      : key(mix(mix(mask.key ^ static_cast<std::uint32_t>(row)) ^ static_cast<std::uint32_t>(offset >> 32))),
        threshold(mask.threshold),
        first(static_cast<std::uint32_t>(offset)) {}

  LOOKSAM_HD std::uint32_t hash(int i) const { return mix(mix((first + static_cast<std::uint32_t>(i)) ^ key) + key); }
  LOOKSAM_HD bool keeps(int i) const { return hash(i) < threshold; }
};

}  // namespace looksam
