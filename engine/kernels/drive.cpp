// Shares work out over threads. Which thread does what never shows in the result: see kChunk.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace keypast {

#if defined(__x86_64__)
namespace avx512 {
extern const Variant table;
}
namespace avx2 {
extern const Variant table;
}
#endif
namespace portable {
extern const Variant table;
}

namespace {

constexpr int64_t kTileRows = 96;           // (query, head) pairs in one tile
constexpr int64_t kReadCost = 6;            // reading and converting one key, in rows attending to it
constexpr int64_t kTasksPerThread = 16;     // tiles costlier than a thread's share over this are split by chunks
constexpr int64_t kSerialCost = 1 << 19;    // channel x key x rows under which a second thread gains next to nothing
constexpr int64_t kSerialFloats = 1 << 16;  // likewise for norms and gates

struct Task {
  int32_t tile, begin, end;  // chunks [begin, end)
  int64_t cost;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Task> tasks;
  int64_t cost = 0, most_rows = 0, partial_floats = 0;
};

std::vector<const Variant*> find_variants() {
  std::vector<const Variant*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) found.push_back(&avx512::table);
  if (avx2) found.push_back(&avx2::table);
#endif
  found.push_back(&portable::table);
  found.push_back(nullptr);
  return found;
}

std::atomic<const Variant*>& choice() {
  static std::atomic<const Variant*> current{variants()[0]};
  return current;
}

// One growing buffer per thread and purpose, kept between calls.
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
thread_local Buffer scratch_buffer, partial_buffer;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("keypast::attend: ") + what);
}

// Every index that memory is reached through.
void check(const Attend& a) {
  require(a.query_start[0] == 0 && a.query_start[a.rows] <= a.tokens, "query_start must run from 0 to at most T");
  require(!a.cos || a.written == a.tokens, "rotary needs a position for each new key: S must be T");
  for (int64_t s = 0; s < a.written; ++s)
    require(a.slots[s] >= 0 && a.slots[s] < a.blocks * a.block_size, "a slot is outside the pool");
  for (int64_t t = 0; a.cos && t < a.tokens; ++t)
    require(a.positions[t] >= 0 && a.positions[t] < a.rotary_length, "a position is outside the rotary table");
  for (int64_t r = 0; r < a.rows; ++r) {
    require(a.query_start[r] <= a.query_start[r + 1], "query_start must not fall");
    require(a.past_length[r] >= 0 && a.present_length[r] >= 0, "lengths must not be negative");
    const int64_t used = (a.present_length[r] + a.block_size - 1) / a.block_size;
    require(used <= a.table_width, "present_length is longer than the block table");
    const int32_t* table = a.block_table + r * a.table_stride;
    for (int64_t b = 0; b < used; ++b) require(table[b] >= 0 && table[b] < a.blocks, "a block is outside the pool");
    const int64_t biases = (a.query_start[r + 1] - a.query_start[r]) * int64_t{a.present_length[r]};
    require(!a.bias || a.bias_start[r + 1] - a.bias_start[r] == biases, "bias_start does not fit n * present_length");
  }
}

void add_tiles(const Attend& a, int64_t row, Plan* plan) {
  const int64_t group = a.heads / a.kv_heads, per_tile = std::max<int64_t>(1, kTileRows / group);
  const int64_t queries = a.query_start[row + 1] - a.query_start[row];
  for (int64_t first = 0; first < queries; first += per_tile) {
    const int64_t n = std::min(per_tile, queries - first);
    int64_t keys = a.present_length[row];
    if (a.causal) keys = std::min(keys, a.past_length[row] + first + n);
    const int64_t chunks = (keys + kChunk - 1) / kChunk, cost = keys * (n * group + kReadCost) * a.head_dim;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const auto index = static_cast<int32_t>(plan->tiles.size());
      plan->tiles.push_back({int32_t(row), int32_t(head), int32_t(first), int32_t(n), int32_t(chunks), -1});
      plan->tasks.push_back({index, 0, int32_t(chunks), cost});
      plan->cost += cost;
    }
    plan->most_rows = std::max(plan->most_rows, n * group);
  }
}

// Splits a task so that no part costs more than `share`; its tile's chunks are then merged after all tasks are done.
void split(const Attend& a, int64_t share, size_t index, Plan* plan) {
  const Task task = plan->tasks[index];
  const int64_t parts = std::min<int64_t>(task.end, (task.cost + share - 1) / share);
  if (parts < 2) return;
  Tile& tile = plan->tiles[task.tile];
  tile.partials = plan->partial_floats;
  plan->partial_floats += task.end * chosen().partial_size(a, tile.queries * (a.heads / a.kv_heads));
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = task.end * i / parts, end = task.end * (i + 1) / parts;
    const Task part = {task.tile, int32_t(begin), int32_t(end), task.cost / parts};
    if (i == 0) plan->tasks[index] = part;
    else plan->tasks.push_back(part);
  }
}

void make_plan(const Attend& a, int threads, Plan* plan) {
  plan->tiles.clear();
  plan->tasks.clear();
  plan->cost = plan->most_rows = plan->partial_floats = 0;
  for (int64_t row = 0; row < a.rows; ++row) add_tiles(a, row, plan);
  if (threads == 1 || plan->cost < kSerialCost) return;
  const int64_t share = std::max<int64_t>(1, plan->cost / (threads * kTasksPerThread));
  for (size_t i = 0, n = plan->tasks.size(); i < n; ++i) split(a, share, i, plan);
  const auto costlier = [](const Task& x, const Task& y) { return x.cost > y.cost; };
  std::stable_sort(plan->tasks.begin(), plan->tasks.end(), costlier);  // the long ones first, so that none ends alone
}

void run_task(const Attend& a, const Variant& kernels, const Plan& plan, const Task& task, float* scratch,
              float* partials) {
  const Tile& tile = plan.tiles[task.tile];
  if (tile.partials < 0) return kernels.attend(a, tile, 0, tile.chunks, scratch, nullptr);
  const int64_t size = kernels.partial_size(a, tile.queries * (a.heads / a.kv_heads));
  kernels.attend(a, tile, task.begin, task.end, scratch, partials + tile.partials + task.begin * size);
}

// Positions of no row give zeros.
void clear_padding(const Attend& a) {
  const int64_t width = a.heads * a.head_dim * bytes_of(a.dtype), used = a.query_start[a.rows];
  std::memset(static_cast<char*>(a.out) + used * width, 0, (a.tokens - used) * width);
}

template <class F>
void share_rows(int64_t rows, int64_t width, int threads, F run) {
  if (threads == 1 || rows * width < kSerialFloats) return run(0, rows);
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    run(rows * i / n, rows * (i + 1) / n);
  }
}

}  // namespace

const Variant* const* variants() {
  static const std::vector<const Variant*> found = find_variants();
  return found.data();
}

const Variant& chosen() { return *choice().load(std::memory_order_relaxed); }

bool choose(const char* name) {
  for (const Variant* const* v = variants(); *v; ++v)
    if (!std::strcmp((*v)->name, name)) return choice().store(*v), true;
  return false;
}

void attend(const Attend& a, int threads) {
  check(a);
  static thread_local Plan plan;  // keeps its vectors' memory
  make_plan(a, threads, &plan);
  const Variant& kernels = chosen();
  const Plan& work = plan;
  const int64_t floats = kernels.scratch_size(a, work.most_rows);
  clear_padding(a);
  if (threads == 1 || work.cost < kSerialCost) {
    float* scratch = scratch_buffer.reserve(floats);
    kernels.write(a, 0, a.written, scratch);
    for (const Task& task : work.tasks) run_task(a, kernels, work, task, scratch, nullptr);
    return;
  }
  float* partials = partial_buffer.reserve(work.partial_floats);
  std::atomic<size_t> next_task{0}, next_tile{0};
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    float* scratch = scratch_buffer.reserve(floats);
    kernels.write(a, a.written * i / n, a.written * (i + 1) / n, scratch);
#pragma omp barrier
    for (size_t t; (t = next_task.fetch_add(1)) < work.tasks.size();)
      run_task(a, kernels, work, work.tasks[t], scratch, partials);
    if (work.partial_floats) {
#pragma omp barrier
      for (size_t t; (t = next_tile.fetch_add(1)) < work.tiles.size();)
        if (work.tiles[t].partials >= 0) kernels.merge(a, work.tiles[t], scratch, partials + work.tiles[t].partials);
    }
  }
}

void rms_norm(const Norm& a, int threads) {
  const Variant& kernels = chosen();
  share_rows(a.rows, a.width, threads, [&](int64_t begin, int64_t end) { kernels.rms_norm(a, begin, end); });
}

void silu_gate(const Gate& a, int threads) {
  const Variant& kernels = chosen();
  share_rows(a.rows, a.width, threads, [&](int64_t begin, int64_t end) { kernels.silu_gate(a, begin, end); });
}

}  // namespace keypast
