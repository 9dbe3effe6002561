// What the drivers share: memory kept between calls, a thread's part of a team's work, attention as such work.
#pragma once
#include <omp.h>

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

// One thread of those that run a parallel region together.
struct Member {
  int64_t index = omp_get_thread_num(), count = omp_get_num_threads();
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
  void wait() const {  // for all of them
#pragma omp barrier
  }
};

struct Task {
  int32_t first, count;  // of its tiles in Plan::members
  int32_t begin, end;    // chunks [begin, end)
  int64_t cost;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<int32_t> members;  // indices of tiles
  std::vector<Task> tasks;
  int64_t cost = 0, most_rows = 0, partial_floats = 0;
};

// What is next, for whichever thread comes first.
struct Turns {
  std::atomic<size_t> task{0}, tile{0};
  std::atomic<int64_t> block{0};
};

void check(const Attend& args);  // throws std::invalid_argument
void make_plan(const Attend& args, int threads, Plan* plan);
// Writes, waits, attends; the caller waits before anyone reads the result or calls it again.
void attend_together(const Attend& args, const Plan& plan, float* partials, Turns* turns, const Member& me);

// A linear, by all members; they have waited when it ends. Rows must be whole before it is called by those who prepare
// them: each member its own.
void linear_together(const Linear& args, Turns* turns, const Member& me);

}  // namespace keypast
