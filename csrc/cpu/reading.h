// How an op reads the memory, chosen by a measurement on its own first chunks: processors differ in what they want, and
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

class ReadingChoice {
 public:
  static constexpr int kMeasured = -1;  // choose by measurement
  static constexpr std::array<Reading, 2> kWays = {{{1, false}, {Reading::kPlaces, true}}};

  // run(first, last, reading) over the chunks first .. last - 1. While nothing is chosen, blocks of them are read in
  // each way in turns and timed; several threads may do so at once.
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

  Reading current() const { return kWays[chosen() == kMeasured ? 0 : chosen()]; }
  int chosen() const { return chosen_.load(std::memory_order_relaxed); }

  static const char* name_of(int way) { return way == kMeasured ? "measured" : way == 0 ? "plain" : "ahead"; }
  static int way_named(const std::string& name) {
    for (int way = kMeasured; way < static_cast<int>(kWays.size()); ++way)
      if (name == name_of(way)) return way;
    throw std::invalid_argument("a way of reading is plain, ahead or measured, not " + name);
  }

  // From now on: one of kWays, or kMeasured to measure anew.
  void choose(int way) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::vector<double>& times : seconds_) times.clear();
    chosen_ = way;
  }

 private:
  static constexpr std::int64_t kBlock = 16;               // chunks: of one column half a MiB
  static constexpr std::size_t kEnough = 12;               // blocks in each way
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
    chosen_ = median(seconds_[1]) < median(seconds_[0]) ? 1 : 0;
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

// Of each op that reads chunks.
struct ReadingChoices {
  ReadingChoice sums, perturb, step;

  template <class Visit>
  void visit(const Visit& visit) {
    visit("sums", sums), visit("perturb", perturb), visit("step", step);
  }
};

inline ReadingChoices& reading_choices() {
  static ReadingChoices choices;
  return choices;
}

}  // namespace looksam::cpu
