// Runs the kernel bodies of csrc/cuda on the CPU, as strictly as the device is allowed to: every thread of a block is a
// fiber of its own, threads run in random order from barrier to barrier, blocks in random order one after the other,
// shared memory begins with garbage. A missing barrier, a divergent one, or a result that depends on the order of
// blocks shows. Built with AddressSanitizer, an access outside of a tensor shows too.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <typeinfo>

#include "../cuda/launch.h"

namespace looksam::cuda {

// Fewer threads than on the device: each has more vectors, and the order of every sum is another one.
inline constexpr int kHarnessThreads = 64;

// What the threads of the running block share with the scheduler.
struct BlockState {
  std::int64_t index, count;
  bool any, any_next;
};

// Called in a fiber: lets the others run until all have called it.
void wait_for_block();

class HarnessBlock {
 public:
  HarnessBlock(int rank, BlockState& state) : rank_(rank), state_(state) {}

  int rank() const { return rank_; }
  int size() const { return kHarnessThreads; }
  std::int64_t index() const { return state_.index; }
  std::int64_t count() const { return state_.count; }
  void barrier() const { wait_for_block(); }
  bool any(bool flag) const {
    state_.any_next = state_.any_next || flag;
    wait_for_block();
    return state_.any;
  }
  std::uint32_t arrive(std::uint32_t* counter) const { return (*counter)++; }

 private:
  int rank_;
  BlockState& state_;
};

// Calls begin_block() before each of the blocks, in random order, and thread(block) in each thread of it.
void run_grid(const char* op, std::int64_t blocks, const std::function<void()>& begin_block,
              const std::function<void(const HarnessBlock&)>& thread);

void count_launch();

// Lets this many launches succeed, then one fail as on a device that cannot run it. Negative: none fails.
void fail_after(std::int64_t launches);
void fail_if_due(const char* op);

// A launch as a driver gets it: the kernel's name in C++, how many blocks, the bytes of its arguments.
using Launch = std::function<void(const std::string& kernel, std::int64_t blocks, const void* args, std::size_t bytes)>;

// Runs every launch from now on in place of the bodies: for what else executes the kernels, as tests/cuda does with
// nvcc's PTX.
void run_launches_with(Launch launch);
const Launch& launches_run_with();

// The name that a C++ type has in the symbol of a kernel.
std::string name_of(const std::type_info& type);

template <class Body, class Args>
std::optional<std::string> why_not_executable() {
  return std::nullopt;
}

template <class Body, class Args>
void execute(const char* op, std::int64_t blocks, const Args& args, Stream) {
  if (blocks == 0) return;
  fail_if_due(op);
  static_assert(sizeof(Args) <= 32764, "more than a launch takes");
  if (const Launch& launch = launches_run_with()) {
    launch("looksam::cuda::kernel<" + name_of(typeid(Body)) + ", " + name_of(typeid(Args)) + ">", blocks, &args,
           sizeof(Args));
    return count_launch();
  }
  using Shared = typename Body::Shared;
  const auto shared = std::make_unique<Shared>();
  // The arguments at their exact size on the heap, where reading past their end is seen.
  const auto copy = std::make_unique<Args>(args);
  run_grid(
      op, blocks, [&] { std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared)); },
      [&](const HarnessBlock& block) { Body::run(block, *shared, *copy); });
  count_launch();
}

}  // namespace looksam::cuda
