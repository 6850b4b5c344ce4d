// The launches of the CUDA ops: plain C++, for the binding. Implemented for the device by the .cu files beside this,
// compiled by nvcc; for the CPU by the same files, compiled by g++ with csrc/harness.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "perturb.cuh"
#include "step.cuh"
#include "sums.cuh"

namespace looksam::cuda {

// Which kernel: the storage types of its columns, wide and narrow.
enum class Kind { f32, bf16, f16, f64 };

inline constexpr int kKinds = 4;

LOOKSAM_HD constexpr Dtype wide(Kind kind) { return kind == Kind::f64 ? Dtype::f64 : Dtype::f32; }
LOOKSAM_HD constexpr Dtype narrow(Kind kind) {
  return kind == Kind::bf16 ? Dtype::bf16 : kind == Kind::f16 ? Dtype::f16 : Dtype::f32;
}

using Stream = void*;  // a cudaStream_t

// Each of these is one launch on the stream, except where it says so, and throws std::runtime_error where that fails.
// blocks: one a chunk of the rows.

// groups: how many of launch.group are set.
void sums(Kind kind, const LargeSums& launch, int groups, Stream stream);
// The trust ratios of LARS, from what sums() has left.
void lars(const LarsArgs& args, Stream stream);
void perturb(Kind kind, std::int64_t blocks, const PerturbArgs& args, Stream stream);
void step(Kind kind, std::int64_t blocks, const StepArgs& args, Stream stream);
// LAMB's second pass, with the arguments of the first.
void lamb_apply(Kind kind, std::int64_t blocks, const StepArgs& args, Stream stream);

// to <- from, a multiple of 4 bytes, inside the kernel's arguments: a launch for every 32 KB. `from` may go at once.
void upload(void* to, const void* from, std::size_t bytes, Stream stream);
// Fills row_of of the map, whose other arrays are uploaded, and sets the counters to 0.
void index_chunks(const ChunkMap& map, std::int32_t* row_of, std::uint32_t* row_arrivals, std::uint32_t* arrivals,
                  Stream stream);

// How many launches there have been.
std::int64_t launches();

// Why the current device runs none of these kernels; nothing where it does.
std::optional<std::string> why_not_here();

}  // namespace looksam::cuda
