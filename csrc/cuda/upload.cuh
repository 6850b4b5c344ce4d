// Filling the table's own arrays from kernel arguments, and what can be computed from them.
#pragma once

#include "block.cuh"
#include "table.cuh"

namespace looksam::cuda {

template <int kWords>
struct UploadArgs {
  std::uint32_t* to;
  std::int32_t words;
  std::uint32_t word[kWords];
};

using SmallUpload = UploadArgs<1016>;
using LargeUpload = UploadArgs<8184>;
static_assert(sizeof(SmallUpload) <= 4096 && sizeof(LargeUpload) <= 32764);

template <class Args>
struct UploadBody {
  static constexpr int kBlocksPerProcessor = 1;
  struct Shared {};

  template <class Block>
  LOOKSAM_HD static void run(const Block& block, Shared&, const Args& a) {
    for (std::int64_t i = block.index() * block.size() + block.rank(); i < a.words; i += block.count() * block.size())
      a.to[i] = a.word[i];
  }
};

struct IndexArgs {
  ChunkMap map;
  std::int32_t* row_of;  // [chunks]
  std::uint32_t *row_arrivals, *arrivals;
};

// One block a row.
struct IndexBody {
  static constexpr int kBlocksPerProcessor = 1;
  struct Shared {};

  template <class Block>
  LOOKSAM_HD static void run(const Block& block, Shared&, const IndexArgs& a) {
    const auto row = static_cast<std::int32_t>(block.index());
    for (std::int64_t i = a.map.first[row] + block.rank(); i < a.map.first[row + 1]; i += block.size())
      a.row_of[i] = row;
    if (block.rank() == 0) a.row_arrivals[row] = 0;
    if (block.rank() == 0 && row == 0) *a.arrivals = 0;
  }
};

}  // namespace looksam::cuda
