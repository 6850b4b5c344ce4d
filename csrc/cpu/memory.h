// How an op uses the memory, chosen by a measurement on its own first chunks: processors differ in what they want, and
// their names do not say it. No result depends on the choice.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "args.h"

namespace looksam::cpu {

class MemoryChoice {
 public:
  static constexpr int kMeasured = -1;  // choose by measurement
  static constexpr std::array<MemoryUse, 4> kWays = {{{false, false}, {false, true}, {true, false}, {true, true}}};
  static constexpr std::array<const char*, 4> kNames = {"plain", "streams", "ahead", "ahead, streams"};

  // run(first, last, memory) over the chunks first .. last - 1. While nothing is chosen, blocks of them are worked
  // off in each way in turns and timed; several threads may do so at once.
  template <class Run>
  void over(const ChunkMap& map, std::int64_t first, std::int64_t last, const Run& run) {
    while (first < last && chosen() == kMeasured && last - first >= kBlock) {
      const std::int64_t end = first + kBlock;
      const int way = static_cast<int>(turn_.fetch_add(1, std::memory_order_relaxed) % kWays.size());
      const auto begin = std::chrono::steady_clock::now();
      run(first, end, kWays[way]);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      record(way, seconds.count(), elements(map, first, end));
      first = end;
    }
    if (first < last) run(first, last, current());
  }

  MemoryUse current() const { return kWays[chosen() == kMeasured ? 0 : chosen()]; }
  int chosen() const { return chosen_.load(std::memory_order_relaxed); }

  static const char* name_of(int way) { return way == kMeasured ? "measured" : kNames[way]; }
  static int way_named(const std::string& name) {
    for (int way = kMeasured; way < static_cast<int>(kWays.size()); ++way)
      if (name == name_of(way)) return way;
    throw std::invalid_argument("a use of the memory is plain; streams; ahead; ahead, streams; or measured, not " +
                                name);
  }

  // From now on: one of kWays, or kMeasured to measure anew.
  void choose(int way) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::vector<double>& times : seconds_) times.clear();
    chosen_ = way;
  }

 private:
  static constexpr std::int64_t kBlock =
      64;  // chunks: of one column two MiB, as what is written late must not fall to others' blocks
  static constexpr std::size_t kEnough = 5;                // blocks in each way
  static constexpr double kFull = 0.75 * kBlock * kChunk;  // elements; blocks of smaller rows measure something else

  static double elements(const ChunkMap& map, std::int64_t first, std::int64_t last) {
    double sum = 0;
    for (std::int64_t i = first; i < last; ++i) sum += map.at(i).size;
    return sum;
  }

  void record(int way, double seconds, double elements) {
    if (elements < kFull) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    seconds_[way].push_back(seconds / elements);
    const auto has_enough = [](const std::vector<double>& times) { return times.size() >= kEnough; };
    if (chosen() != kMeasured || !std::all_of(seconds_.begin(), seconds_.end(), has_enough)) return;
    std::array<double, kWays.size()> each;
    std::transform(seconds_.begin(), seconds_.end(), each.begin(),
                   [](std::vector<double>& times) { return median(times); });
    chosen_ = static_cast<int>(std::min_element(each.begin(), each.end()) - each.begin());
  }

  static double median(std::vector<double>& times) {
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
  }

  std::atomic<int> chosen_{kMeasured};
  std::atomic<unsigned> turn_{0};
  std::mutex mutex_;
  std::array<std::vector<double>, kWays.size()> seconds_;
};

// Of each op that walks over chunks.
struct MemoryChoices {
  MemoryChoice sums, perturb, step;

  template <class Visit>
  void visit(const Visit& visit) {
    visit("sums", sums), visit("perturb", perturb), visit("step", step);
  }
};

inline MemoryChoices& memory_choices() {
  static MemoryChoices choices;
  return choices;
}

}  // namespace looksam::cpu
