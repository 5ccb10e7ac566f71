// A team of threads that share work.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

// The calling thread and helper threads from XLA's pool. Waking a thread takes
// longer than many pieces of work, so helpers stay while there is work, and
// until kLinger has passed without any: a network calls the next kernel soon.
class Team {
 public:
  explicit Team(xla::ffi::ThreadPool pool)
      : pool_(pool), work_(Exchange(nullptr)) {
    if (work_ == nullptr || work_->shares.size() != static_cast<size_t>(size()))
      work_ = std::make_shared<Work>(size());
  }
  Team(const Team&) = delete;
  // The next team continues with the helpers of this one. Teams that exist at
  // the same time have their own.
  ~Team() {
    if (const auto replaced = Exchange(work_))
      replaced->closed.store(true, std::memory_order_relaxed);
  }

  int64_t size() const { return std::max<int64_t>(pool_.num_threads(), 1); }

  // Calls run(begin, end) on ranges that cover [0, units). Each thread has its
  // own share of units, which it takes in order, so that prefetched data is
  // needed next. A thread that is done helps others. Ranges are long at first
  // and single units at the end (Polychronopoulos and Kuck, "Guided
  // Self-Scheduling", 1987). The caller never waits for a unit that no thread
  // has started.
  template <typename Function>
  void Run(int64_t units, const Function& run) {
    if (units == 0) return;
    Work& work = *work_;
    while (work.helpers.load(std::memory_order_relaxed) <
           std::min(size(), units) - 1) {
      const int64_t own =
          work.helpers.fetch_add(1, std::memory_order_relaxed) + 1;
      pool_.Schedule([work = work_, own] {
        Idle idle;
        while (!work->closed.load(std::memory_order_relaxed) &&
               idle.time < kLinger)
          if (work->Take(own))
            idle = Idle();
          else
            idle.Wait();
        work->helpers.fetch_sub(1, std::memory_order_relaxed);
      });
    }
    work.call = [](const void* function, int64_t begin, int64_t end) {
      (*static_cast<const Function*>(function))(begin, end);
    };
    work.function = &run;
    work.done.store(0, std::memory_order_relaxed);
    const int64_t shares = work.shares.size();
    for (int64_t i = 0; i < shares; ++i)
      work.shares[i].left.store(
          Range{static_cast<uint32_t>(units * i / shares),
                static_cast<uint32_t>(units * (i + 1) / shares)},
          std::memory_order_release);
    while (work.Take(0)) {
    }
    for (Idle idle; work.done.load(std::memory_order_acquire) < units;)
      idle.Wait();
  }

 private:
  static constexpr std::chrono::microseconds kLinger{300};

  struct Range {
    uint32_t begin, end;
  };

  struct alignas(64) Share {
    std::atomic<Range> left{Range{0, 0}};
  };

  struct Work {
    // Changed only when all units are taken and done. A thread that has taken
    // units thus reads the values that belong to them.
    void (*call)(const void* function, int64_t begin, int64_t end);
    const void* function;
    std::vector<Share> shares;
    std::atomic<int64_t> done{0}, helpers{0};
    std::atomic<bool> closed{false};

    explicit Work(int64_t size) : shares(size) {}

    // Runs some units, if any are left.
    bool Take(int64_t own) {
      for (size_t i = 0; i < shares.size(); ++i)
        if (TakeOf(shares[(own + i) % shares.size()].left, i == 0)) return true;
      return false;
    }

    // Runs some units of a share: the first ones if it is the thread's own
    // share, otherwise the last ones.
    bool TakeOf(std::atomic<Range>& left, bool own) {
      Range before = left.load(std::memory_order_acquire), after, taken;
      do {
        const uint32_t size = before.end - before.begin;
        if (size == 0) return false;
        const uint32_t count = std::max<uint32_t>(size / 4, 1);
        after = taken = before;
        if (own)
          taken.end = after.begin = before.begin + count;
        else
          taken.begin = after.end = before.end - count;
      } while (!left.compare_exchange_weak(before, after,
                                           std::memory_order_acquire));
      call(function, taken.begin, taken.end);
      done.fetch_add(taken.end - taken.begin, std::memory_order_release);
      return true;
    }
  };

  // How long a thread has had no work. After a while, other threads go first.
  struct Idle {
    int64_t waits = 0;
    std::chrono::steady_clock::time_point since;
    std::chrono::steady_clock::duration time{0};

    void Wait() {
      if (++waits > 1000) {
        std::this_thread::yield();
        const auto now = std::chrono::steady_clock::now();
        if (waits == 1001) since = now;
        time = now - since;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  };

  // Replaces the work whose helpers wait for the next team.
  static std::shared_ptr<Work> Exchange(std::shared_ptr<Work> work) {
    // Never destroyed, because kernels may still run when the process exits.
    static std::mutex& mutex = *new std::mutex;
    static auto& waiting = *new std::shared_ptr<Work>;
    const std::lock_guard<std::mutex> lock(mutex);
    return std::exchange(waiting, std::move(work));
  }

  xla::ffi::ThreadPool pool_;
  std::shared_ptr<Work> work_;
};

}  // namespace
