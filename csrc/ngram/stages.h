#pragma once
#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pgolf::ngram {

// One pass over the blocks of a stream, in order. Block b may run once each stage of `after` has finished block b and
// the stage `gate` (if any) has finished all of them.
struct Stage {
  std::function<void(int64_t)> run;
  std::vector<int> after;
  int gate = -1;
};

// Runs all stages over `blocks` blocks on up to `threads` threads; earlier stages first where there is a choice.
inline void run_stages(const std::vector<Stage>& stages, int64_t blocks, int threads) {
  std::vector<int64_t> done(stages.size(), 0);
  std::vector<char> busy(stages.size(), 0);
  std::mutex mutex;
  std::condition_variable changed;
  std::exception_ptr failure;

  const auto ready = [&](size_t s) {
    if (busy[s] || done[s] == blocks) return false;
    if (stages[s].gate >= 0 && done[stages[s].gate] < blocks) return false;
    return std::all_of(stages[s].after.begin(), stages[s].after.end(),
                       [&](int other) { return done[other] > done[s]; });
  };
  const auto work = [&] {
    std::unique_lock<std::mutex> lock(mutex);
    while (!failure) {
      size_t s = 0;
      while (s < stages.size() && !ready(s)) ++s;
      if (s == stages.size()) {
        if (std::all_of(done.begin(), done.end(), [&](int64_t d) { return d == blocks; })) return;
        changed.wait(lock);
        continue;
      }
      busy[s] = 1;
      lock.unlock();
      std::exception_ptr error;
      try {
        stages[s].run(done[s]);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      busy[s] = 0;
      ++done[s];
      if (error && !failure) failure = error;
      changed.notify_all();
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int t = 1; t < std::min<int>(threads, static_cast<int>(stages.size())); ++t) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system grants no more threads; those that run do all the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace pgolf::ngram
