// A team of threads that share work.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

// The calling thread and helper threads from XLA's pool. Helpers stay for the
// lifetime of the team, so they need not be woken for each piece of work.
class Team {
 public:
  explicit Team(xla::ffi::ThreadPool pool) : pool_(pool) {}
  Team(const Team&) = delete;
  ~Team() { work_->closed.store(true, std::memory_order_relaxed); }

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
    for (; helpers_ < std::min(size(), units) - 1; ++helpers_)
      pool_.Schedule([work = work_, own = helpers_ + 1] {
        for (int64_t idle = 0; !work->closed.load(std::memory_order_relaxed);)
          if (work->Take(own))
            idle = 0;
          else
            Wait(idle);
      });
    Work& work = *work_;
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
    for (int64_t idle = 0; work.done.load(std::memory_order_acquire) < units;)
      Wait(idle);
  }

 private:
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
    std::atomic<int64_t> done{0};
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

  static void Wait(int64_t& idle) {
    if (++idle > 1000) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  xla::ffi::ThreadPool pool_;
  int64_t helpers_ = 0;
  std::shared_ptr<Work> work_ = std::make_shared<Work>(size());
};

}  // namespace
