// What the drivers share: memory kept between calls, a thread's part of a team's work, attention as such work.
#pragma once
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "kernels.h"

namespace keypast {

// One growing buffer per thread and purpose.
struct Buffer {
  float* data = nullptr;
  size_t capacity = 0;
  ~Buffer() { std::free(data); }
  float* reserve(size_t floats) {
    if (floats > capacity) {
      std::free(data);
      capacity = (floats + 1023) / 1024 * 1024;
      data = static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float)));
      if (!data) capacity = 0, throw std::bad_alloc();
    }
    return data;
  }
};

// Where the threads of a team wait for each other, some ten times a block. Whoever waits looks again and again while all
// of them run. As soon as one does not, because another process has its core, that would only keep it off this one too,
// and each wait would cost a time slice, as OpenMP's own does: so it gives way after microseconds, and then sleeps.
class Barrier {
 public:
  void wait(int64_t count) {
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      turn_.notify_all();
      return;
    }
    for (int i = 0; i < kLooks; ++i, pause())
      if (turn_.load(std::memory_order_acquire) != turn) return;
    for (int i = 0; i < kYields; ++i, sched_yield())
      if (turn_.load(std::memory_order_acquire) != turn) return;
    turn_.wait(turn, std::memory_order_acquire);
  }

 private:
  static constexpr int kLooks = 256;   // some 4 microseconds
  static constexpr int kYields = 256;  // some 80 where nobody else wants the core
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  alignas(64) std::atomic<uint32_t> turn_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
};

// One thread of those that run a parallel region together.
struct Member {
  Barrier& barrier;
  int64_t index = omp_get_thread_num(), count = omp_get_num_threads();
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
  void wait() const { barrier.wait(count); }  // for all of them
};

struct Range {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

// The numbers [0, n), dealt to a team. Each member takes those of its own part from the front, so that it reads one run
// of memory and fetches nothing ahead that another one reads; then, one by one, what others have left, from the back.
class Shares {
 public:
  explicit Shares(int64_t members) : parts_(members) {}
  // By every member, once all have waited since they took the last.
  void deal(const Member& me, int64_t n) {
    parts_[me.index].range.store(static_cast<uint64_t>(me.begin(n)) << 32 | me.end(n), std::memory_order_release);
  }
  // Empty: there are none left. `at_once` says how many may be taken together from a number on.
  template <class F>
  Range take(const Member& me, F at_once) {
    Range taken = parts_[me.index].take_front(at_once);
    for (int64_t i = 1; i < me.count && taken.empty(); ++i) taken = parts_[(me.index + i) % me.count].take_back();
    return taken;
  }

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> range{0};  // its first number in the upper half, its end in the lower
    template <class F>
    Range take_front(F at_once) {
      return take([&](int64_t begin, int64_t end) { return Range{begin, std::min(end, begin + at_once(begin))}; });
    }
    Range take_back() {
      return take([](int64_t, int64_t end) { return Range{end - 1, end}; });
    }
    template <class F>
    Range take(F choose) {
      uint64_t now = range.load(std::memory_order_acquire);
      while (true) {
        const int64_t begin = now >> 32, end = static_cast<uint32_t>(now);
        if (begin >= end) return {};
        const Range taken = choose(begin, end);
        const uint64_t left = taken.begin == begin ? static_cast<uint64_t>(taken.end) << 32 | end : now - 1;
        if (range.compare_exchange_weak(now, left)) return taken;
      }
    }
  };
  std::vector<Part> parts_;
};

// What there is to do, and where the members wait for each other.
struct Turns {
  explicit Turns(int64_t members) : tasks(members), tiles(members), blocks(members) {}
  Shares tasks, tiles, blocks;
  Barrier barrier;
};

struct Task {
  int32_t first, count;  // of its tiles in Plan::members
  int32_t begin, end;    // chunks [begin, end)
  int64_t cost;
  int32_t beside;  // tasks from this one on that are alike but for their heads, to be taken together
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<int32_t> members;  // indices of tiles
  std::vector<Task> tasks;
  int64_t cost = 0, most_rows = 0, partial_floats = 0;
};

void check(const Attend& args);  // throws std::invalid_argument
// One that costs less than `least` is not split for several threads.
void make_plan(const Attend& args, int threads, Plan* plan, int64_t least = 0);
// Writes, waits, attends; the caller waits before anyone reads the result or calls it again.
void attend_together(const Attend& args, const Plan& plan, float* partials, Turns* turns, const Member& me);

// A linear, by all members; they have waited when it ends. Rows must be whole before it is called by those who prepare
// them: each member its own.
void linear_together(const Linear& args, Turns* turns, const Member& me);

}  // namespace keypast
