// Shares work out over threads. Which thread does what never shows in the result: see kChunk.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "drive.h"

namespace keypast {

#if defined(__x86_64__)
namespace avx512 {
extern const Variant table, vnni_table, bf16_table;
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
constexpr int64_t kStepsPerThread = 8;      // a linear's outputs are taken in so many steps, whoever is free
constexpr int64_t kRowsAtOnce = 192;        // of a linear: their inputs stay in the second cache while weights pass by
constexpr int64_t kSerialCost = 1 << 19;    // channel x key x rows under which a second thread gains next to nothing
constexpr int64_t kSerialFloats = 1 << 16;  // likewise for norms and gates

std::vector<const Variant*> find_variants() {
  std::vector<const Variant*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx2 && avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512::bf16_table);
  if (vnni) found.push_back(&avx512::vnni_table);
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

thread_local Buffer scratch_buffer, partial_buffer;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("keypast::attend: ") + what);
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

void attend_together(const Attend& a, const Plan& plan, float* partials, Turns* turns, const Member& me) {
  const Variant& kernels = chosen();
  float* scratch = scratch_buffer.reserve(kernels.scratch_size(a, plan.most_rows));
  kernels.write(a, me.begin(a.written), me.end(a.written), scratch);
  if (me.index == 0) turns->task = 0, turns->tile = 0, clear_padding(a);
  me.wait();
  for (size_t t; (t = turns->task.fetch_add(1)) < plan.tasks.size();)
    run_task(a, kernels, plan, plan.tasks[t], scratch, partials);
  if (!plan.partial_floats) return;
  me.wait();
  for (size_t t; (t = turns->tile.fetch_add(1)) < plan.tiles.size();)
    if (plan.tiles[t].partials >= 0) kernels.merge(a, plan.tiles[t], scratch, partials + plan.tiles[t].partials);
}

void attend(const Attend& a, int threads) {
  check(a);
  static thread_local Plan plan;  // keeps its vectors' memory
  make_plan(a, threads, &plan);
  Turns turns;
  if (threads == 1 || plan.cost < kSerialCost) return attend_together(a, plan, nullptr, &turns, Member{0, 1});
  float* partials = partial_buffer.reserve(plan.partial_floats);
  const Plan& work = plan;
#pragma omp parallel num_threads(threads)
  attend_together(a, work, partials, &turns, Member());
}

void rms_norm(const Norm& a, int threads) {
  const Variant& kernels = chosen();
  share_rows(a.rows, a.width, threads, [&](int64_t begin, int64_t end) { kernels.rms_norm(a, begin, end); });
}

void silu_gate(const Gate& a, int threads) {
  const Variant& kernels = chosen();
  share_rows(a.rows, a.width, threads, [&](int64_t begin, int64_t end) { kernels.silu_gate(a, begin, end); });
}

void linear_together(const Linear& a, Turns* turns, const Member& me) {
  const Variant& kernels = chosen();
  kernels.prepare(a, me.begin(a.rows), me.end(a.rows));
  if (me.index == 0) turns->block = 0;
  me.wait();
  const int64_t blocks = a.weight.blocks(), step = std::max<int64_t>(1, blocks / (me.count * kStepsPerThread));
  for (int64_t begin; (begin = turns->block.fetch_add(step)) < blocks;)
    for (int64_t row = 0; row < a.rows; row += kRowsAtOnce)
      kernels.multiply(a, begin, std::min(blocks, begin + step), row, std::min(a.rows, row + kRowsAtOnce));
  me.wait();
}

void linear(Linear a, int threads) {
  a.scratch = scratch_buffer.reserve(a.scratch_floats());
  Turns turns;
#pragma omp parallel num_threads(threads)
  linear_together(a, &turns, Member());
}

}  // namespace keypast
