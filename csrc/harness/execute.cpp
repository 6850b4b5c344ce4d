#include "execute.h"

#include <cxxabi.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace looksam::cuda {

namespace {

constexpr std::size_t kStack = 256 * 1024;

std::int64_t launches_until_failure = -1;
Launch launch_runner;

struct Fiber {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  ucontext_t context;
  void* fake_stack = nullptr;
  bool running = false;
};

struct Scheduler {
  std::vector<Fiber> fibers = std::vector<Fiber>(kHarnessThreads);
  ucontext_t home;
  void* home_fake_stack = nullptr;
  const void* home_stack = nullptr;
  std::size_t home_stack_size = 0;
  int current = 0;
  BlockState block = {};
  const std::function<void(const HarnessBlock&)>* thread = nullptr;
  std::mt19937_64 random{0x5eed};  // goes on from launch to launch: no two have the same order
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

// AddressSanitizer must know which stack is in use. These do nothing in a build without it.

void announce_switch(void** fake_stack, const void* stack, std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
#else
  (void)fake_stack, (void)stack, (void)size;
#endif
}

void complete_switch(void* fake_stack, const void** old_stack, std::size_t* old_size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_size);
#else
  (void)fake_stack, (void)old_stack, (void)old_size;
#endif
}

void fiber_main() {
  Scheduler& s = scheduler();
  complete_switch(nullptr, &s.home_stack, &s.home_stack_size);
  const int rank = s.current;
  (*s.thread)(HarnessBlock(rank, s.block));
  s.fibers[rank].running = false;
  announce_switch(nullptr, s.home_stack, s.home_stack_size);
  setcontext(&s.home);
}

void resume(int rank) {
  Scheduler& s = scheduler();
  s.current = rank;
  Fiber& fiber = s.fibers[rank];
  announce_switch(&s.home_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&s.home, &fiber.context);
  complete_switch(s.home_fake_stack, nullptr, nullptr);
}

// From barrier to barrier, until all threads have returned.
void run_block(const char* op) {
  Scheduler& s = scheduler();
  for (Fiber& fiber : s.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.running = true;
  }
  std::vector<int> order(s.fibers.size());
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t waiting = order.size(); waiting > 0;) {
    std::shuffle(order.begin(), order.end(), s.random);
    s.block.any_next = false;
    for (const int rank : order) resume(rank);
    s.block.any = s.block.any_next;
    waiting = static_cast<std::size_t>(
        std::count_if(s.fibers.begin(), s.fibers.end(), [](const Fiber& fiber) { return fiber.running; }));
    if (waiting != 0 && waiting != order.size())
      throw std::runtime_error(std::string(op) + ": some threads of a block ended while others wait at a barrier");
  }
}

}  // namespace

void fail_after(std::int64_t launches) { launches_until_failure = launches; }

void fail_if_due(const char* op) {
  if (launches_until_failure >= 0 && launches_until_failure-- == 0)
    throw std::runtime_error(std::string(op) + ": a launch that was to fail");
}

void run_launches_with(Launch launch) { launch_runner = std::move(launch); }
const Launch& launches_run_with() { return launch_runner; }

std::string name_of(const std::type_info& type) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(type.name(), nullptr, nullptr, &status),
                                                    std::free);
  if (status != 0) throw std::runtime_error(std::string("not a type's name: ") + type.name());
  return name.get();
}

void wait_for_block() {
  Scheduler& s = scheduler();
  Fiber& fiber = s.fibers[s.current];
  announce_switch(&fiber.fake_stack, s.home_stack, s.home_stack_size);
  swapcontext(&fiber.context, &s.home);
  complete_switch(fiber.fake_stack, &s.home_stack, &s.home_stack_size);
}

void run_grid(const char* op, std::int64_t blocks, const std::function<void()>& begin_block,
              const std::function<void(const HarnessBlock&)>& thread) {
  Scheduler& s = scheduler();
  s.thread = &thread;
  std::vector<std::int64_t> order(static_cast<std::size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), s.random);
  for (const std::int64_t index : order) {
    s.block = {index, blocks, false, false};
    begin_block();
    run_block(op);
  }
}

}  // namespace looksam::cuda
