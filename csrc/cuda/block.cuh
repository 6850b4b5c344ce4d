// What a kernel body may ask of the block of threads that runs it. A body sees a Block with
//
//   rank(), size()     of this thread among the block's threads
//   index(), count()   of this block among the launch's blocks; no block may wait for another
//   barrier()          all threads of the block, with what they wrote before it
//   arrive(counter)    thread 0 only: publishes what the block wrote, returns how many arrived before, and sees what
//   they wrote any(flag)          a barrier; is the flag set in any thread?
//
// On the device it is the one below. The host harness (csrc/harness) has another, and runs the same bodies.
#pragma once

#include "../core/dtype.h"

namespace looksam::cuda {

inline constexpr int kThreads = 256;

// Scratch memory of block_sum. Every body's Shared begins with one.
struct SumScratch {
  double of_thread[kThreads];
  double of_lane[32];
};

// The sum over the block's threads, in an order that depends on their number only; every thread gets it.
template <class Block>
LOOKSAM_HD double block_sum(const Block& block, SumScratch& scratch, double x) {
  scratch.of_thread[block.rank()] = x;
  block.barrier();
  if (block.rank() < 32) {
    double sum = 0;
    for (int k = block.rank(); k < block.size(); k += 32) sum += scratch.of_thread[k];
    scratch.of_lane[block.rank()] = sum;
  }
  block.barrier();
  double total = 0;
  for (int lane = 0; lane < 32; ++lane) total += scratch.of_lane[lane];
  block.barrier();
  return total;
}

// Is this the last of `expected` blocks to arrive? It may then read what the others wrote before they arrived. The
// counter is 0 before the first and after the last.
template <class Block>
LOOKSAM_HD bool last_to_arrive(const Block& block, std::uint32_t* counter, std::int64_t expected) {
  bool last = false;
  if (block.rank() == 0) {
    last = block.arrive(counter) + 1 == expected;
    if (last) *counter = 0;
  }
  return block.any(last);
}

#if defined(__CUDACC__)

struct DeviceBlock {
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return kThreads; }
  __device__ __forceinline__ std::int64_t index() const { return blockIdx.x; }
  __device__ __forceinline__ std::int64_t count() const { return gridDim.x; }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  __device__ __forceinline__ bool any(bool flag) const { return __syncthreads_or(flag) != 0; }
  __device__ __forceinline__ std::uint32_t arrive(std::uint32_t* counter) const {
    __threadfence();
    const std::uint32_t before = atomicAdd(counter, 1u);
    __threadfence();
    return before;
  }
};

#endif

}  // namespace looksam::cuda
