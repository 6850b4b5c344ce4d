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

// Up to kSums sums over the block's threads at a time, in an order that depends on the number of threads only: those
// that are 32 apart first, then the 32 that this gives. Lies in shared memory.
template <int kSums>
class BlockSums {
 public:
  // This thread's term of the k-th sum.
  template <class Block>
  LOOKSAM_HD void put(const Block& block, int k, double term) {
    of_thread_[k][block.rank()] = term;
  }

  // The k-th of `count` sums in thread k, 0 in the threads that have none.
  template <class Block>
  LOOKSAM_HD double totals(const Block& block, int count) {
    block.barrier();
    for (int i = block.rank(); i < count * kLanes; i += block.size()) {
      const double* const term = of_thread_[i / kLanes];
      double sum = 0;
      for (int k = i % kLanes; k < block.size(); k += kLanes) sum += term[k];
      of_lane_[i / kLanes][i % kLanes] = sum;
    }
    block.barrier();
    double total = 0;
    if (block.rank() < count)
      for (int lane = 0; lane < kLanes; ++lane) total += of_lane_[block.rank()][lane];
    return total;
  }

 private:
  static constexpr int kLanes = 32;

  double of_thread_[kSums][kThreads];
  double of_lane_[kSums][kLanes + 1];  // one more, so that the threads of totals() read from different banks
};

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
    // One order for this counter is enough: __threadfence() would be one for all memory, twice a block.
    std::uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    return before;
  }
};

#endif

}  // namespace looksam::cuda
