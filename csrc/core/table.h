// The tensor table as plain arrays: a row is one parameter, a column one role that it plays.
#pragma once

#include <vector>

#include "dtype.h"

namespace looksam {

// Elements of a chunk, the unit of work. Partial sums are stored by chunk and added up in its order, so this number,
// and nothing of the machine, decides the bits of a sum.
inline constexpr std::int64_t kChunk = 8192;

// One tensor for each row. data[row] is null where the row has none; elements lie in the memory order of the row's w.
struct Column {
  void* const* data = nullptr;
  const Dtype* dtype = nullptr;

  LOOKSAM_HD bool has(std::int64_t row) const { return data != nullptr && data[row] != nullptr; }
};

// A run of elements of one row: the offset may pass 2^31, the size never does.
struct Chunk {
  std::int32_t row;
  std::int32_t size;
  std::int64_t offset;
};

// Rows cut into chunks; chunk i of the list belongs to row_of[i], whose chunks are first[row] .. first[row + 1] - 1.
struct ChunkMap {
  std::int32_t rows;
  std::int64_t chunks;
  const std::int64_t* numel;   // [rows]
  const std::int64_t* first;   // [rows + 1]
  const std::int32_t* row_of;  // [chunks]

  LOOKSAM_HD Chunk at(std::int64_t index) const {
    const std::int32_t row = row_of[index];
    const std::int64_t offset = (index - first[row]) * kChunk;
    const std::int64_t left = numel[row] - offset;
    return {row, static_cast<std::int32_t>(left < kChunk ? left : kChunk), offset};
  }
};

// Owns the arrays of a ChunkMap on the host. Empty rows have no chunk.
struct ChunkList {
  std::vector<std::int64_t> numel;
  std::vector<std::int64_t> first;
  std::vector<std::int32_t> row_of;

  explicit ChunkList(std::vector<std::int64_t> sizes = {}) : numel(std::move(sizes)), first{0} {
    for (const std::int64_t n : numel) first.push_back(first.back() + (n + kChunk - 1) / kChunk);
    row_of.reserve(static_cast<std::size_t>(first.back()));
    for (std::size_t row = 0; row < numel.size(); ++row)
      row_of.insert(row_of.end(), static_cast<std::size_t>(first[row + 1] - first[row]),
                    static_cast<std::int32_t>(row));
  }

  ChunkMap map() const {
    return {static_cast<std::int32_t>(numel.size()), first.back(), numel.data(), first.data(), row_of.data()};
  }
};

}  // namespace looksam
