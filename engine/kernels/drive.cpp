// Shares work out over threads. Which thread does what never shows in the result: see kChunk.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

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

constexpr int64_t kReadCost = 6;            // reading and converting one key, in rows attending to it
constexpr int64_t kTasksPerThread = 5;      // tiles costlier than a thread's share over this are split by chunks
constexpr int64_t kJointPerThread = 4;      // tiles attended together that cost more than this share are taken apart
constexpr int64_t kLeastShared = 64;        // keys of a chunk that rows must have in common to be attended together
constexpr int64_t kStepsOfFew = 64;         // a linear's outputs are taken in up to so many steps a thread
constexpr int64_t kStepsOfMany = 8;         // likewise for more than kRowsAtOnce: all their inputs pass by at each step
constexpr int64_t kRowsBeside = 8;          // (query, head) pairs up to which tiles of several heads are read together
constexpr int64_t kSerialCost = 1 << 19;    // channel x key x rows under which a second thread gains next to nothing
constexpr int64_t kTeamCost = 1 << 21;      // the same where a team has yet to be called together, and spins afterwards
constexpr int64_t kSerialFloats = 1 << 16;  // likewise for norms and gates
constexpr int64_t kSerialProducts = 1 << 21;  // likewise for linears, where to read a weight is worth kReadWeight of them
constexpr int64_t kReadWeight = 3;

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

int64_t rows_of(const Attend& a, const Tile& tile) { return tile.queries * (a.heads / a.kv_heads); }

int64_t keys_of(const Attend& a, const Tile& tile) {  // that its longest-sighted query sees
  const int64_t present = a.present_length[tile.row], past = a.past_length[tile.row];
  return a.causal ? std::min(present, past + tile.first + tile.queries) : present;
}

int64_t cost_of(const Attend& a, int64_t keys, int64_t rows) { return keys * (rows + kReadCost) * a.head_dim; }

void add_task(const Attend& a, int32_t tile, int32_t begin, Plan* plan) {
  const Tile& t = plan->tiles[tile];
  const int64_t cost = cost_of(a, keys_of(a, t) - int64_t{begin} * kChunk, rows_of(a, t));
  plan->tasks.push_back({int32_t(plan->members.size()), 1, begin, t.chunks, cost, 1});
  plan->members.push_back(tile);
  plan->cost += cost;
}

void add_tiles(const Attend& a, int64_t row, Plan* plan) {
  const int64_t per_tile = std::max<int64_t>(1, kTileRows / (a.heads / a.kv_heads));
  const int64_t queries = a.query_start[row + 1] - a.query_start[row];
  for (int64_t first = 0; first < queries; first += per_tile)
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t n = std::min(per_tile, queries - first);
      Tile tile{int32_t(row), int32_t(head), int32_t(first), int32_t(n), 0, -1};
      tile.chunks = int32_t((keys_of(a, tile) + kChunk - 1) / kChunk);
      plan->tiles.push_back(tile);
      plan->most_rows = std::max(plan->most_rows, rows_of(a, tile));
    }
}

void keep_partials(const Attend& a, Tile* tile, Plan* plan) {
  if (tile->partials >= 0) return;
  tile->partials = plan->partial_floats;
  plan->partial_floats += tile->chunks * chosen().partial_size(a, rows_of(a, *tile));
}

// Finds batch rows whose first keys lie in the same blocks, forks of one session mostly, and has those keys read once.
class Joiner {
 public:
  Joiner(const Attend& args, Plan* result) : a(args), plan(result) {}

  // Adds the tasks of all tiles.
  void add_tasks() {
    for (size_t i = 0; i < plan->tiles.size(); ++i) {
      if (!may_join(plan->tiles[i])) add_task(a, int32_t(i), 0, plan);
      else if (plan->tiles[i].kv_head == 0) order.push_back(int32_t(i));
    }
    std::sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
      const int32_t *first = table(x), *second = table(y);
      const auto [at, other] = std::mismatch(first, first + blocks(x), second, second + blocks(y));
      if (at != first + blocks(x) && other != second + blocks(y)) return *at < *other;
      return blocks(x) != blocks(y) ? blocks(x) < blocks(y) : x < y;
    });
    shared.assign(order.size() + 1, 0);
    for (size_t i = 1; i < order.size(); ++i) shared[i] = common(order[i - 1], order[i]);
    add_runs(0, order.size(), 0);
  }

 private:
  // Rows whose queries fill half a tile gain little, and vectors must not cross the ends of blocks.
  bool may_join(const Tile& tile) const {
    const int64_t queries = a.query_start[tile.row + 1] - a.query_start[tile.row];
    return a.rows > 1 && a.block_size % kLanes == 0 && a.head_dim % kLanes == 0 && tile.queries == queries &&
           2 * rows_of(a, tile) <= kTileRows;
  }

  // Tiles of one row follow each other, in order of their heads; `order` holds the first ones.
  const int32_t* table(int32_t tile) const { return a.block_table + plan->tiles[tile].row * a.table_stride; }
  int64_t keys(int32_t tile) const { return keys_of(a, plan->tiles[tile]); }
  int64_t blocks(int32_t tile) const { return (keys(tile) + a.block_size - 1) / a.block_size; }

  int64_t common(int32_t x, int32_t y) const {
    const int64_t n = std::min(blocks(x), blocks(y));
    const int64_t same = std::mismatch(table(x), table(x) + n, table(y)).first - table(x);
    return std::min({same * a.block_size, keys(x), keys(y)});
  }

  // Takes order[begin, end) apart into rows that share keys of this chunk, and those again for the chunks behind.
  void add_runs(size_t begin, size_t end, int32_t chunk) {
    const int64_t least = int64_t{chunk} * kChunk + kLeastShared;
    for (size_t i = begin, next; i < end; i = next) {
      int64_t rows = rows_of(a, plan->tiles[order[i]]), same = keys(order[i]);
      for (next = i + 1; next < end && shared[next] >= least; ++next) {
        const int64_t more = rows_of(a, plan->tiles[order[next]]);
        if (rows + more > kTileRows) break;
        rows += more, same = std::min(same, shared[next]);
      }
      if (next - i > 1) add_joint(i, next, chunk, same);
      else if (chunk < plan->tiles[order[i]].chunks || !chunk) add_alone(order[i], chunk);
    }
  }

  void add_alone(int32_t tile, int32_t chunk) {
    for (int32_t head = 0; head < a.kv_heads; ++head) add_task(a, tile + head, chunk, plan);
  }

  void add_joint(size_t begin, size_t end, int32_t chunk, int64_t same) {
    const int64_t start = int64_t{chunk} * kChunk, shared_keys = std::min<int64_t>(same - start, kChunk);
    int64_t rows = 0, cost = 0;
    for (size_t i = begin; i < end; ++i) {
      const int64_t own = rows_of(a, plan->tiles[order[i]]);
      cost += cost_of(a, std::min<int64_t>(keys(order[i]) - start, kChunk) - shared_keys, own);
      rows += own;
    }
    cost += cost_of(a, shared_keys, rows);
    plan->most_rows = std::max(plan->most_rows, rows);
    for (int32_t head = 0; head < a.kv_heads; ++head) {
      plan->tasks.push_back({int32_t(plan->members.size()), int32_t(end - begin), chunk, chunk + 1, cost, 1});
      plan->cost += cost;
      for (size_t i = begin; i < end; ++i) {
        keep_partials(a, &plan->tiles[order[i] + head], plan);
        plan->members.push_back(order[i] + head);
      }
    }
    add_runs(begin, end, chunk + 1);
  }

  const Attend& a;
  Plan* plan;
  std::vector<int32_t> order;   // the first tile of each row that may join, by block tables
  std::vector<int64_t> shared;  // keys that a row in `order` has in common with the one before
};

// Splits a task so that no part costs more than `share`: one tile's by chunks, several tiles' into fewer at a time.
void split(const Attend& a, int64_t share, size_t index, Plan* plan) {
  const Task task = plan->tasks[index];
  const bool alone = task.count == 1;
  const int64_t limit = alone ? share : share * kTasksPerThread / kJointPerThread;
  const int64_t n = alone ? task.end - task.begin : task.count;
  const int64_t parts = std::min<int64_t>(n, (task.cost + limit - 1) / limit);
  if (parts < 2) return;
  if (alone) keep_partials(a, &plan->tiles[plan->members[task.first]], plan);
  for (int64_t i = 0; i < parts; ++i) {
    const int32_t begin = int32_t(n * i / parts), end = int32_t(n * (i + 1) / parts);
    Task part = task;
    part.cost = task.cost / parts;
    if (alone) part.begin = task.begin + begin, part.end = task.begin + end;
    else part.first = task.first + begin, part.count = end - begin;
    if (i == 0) plan->tasks[index] = part;
    else plan->tasks.push_back(part);
  }
}

const Tile& tile_of(const Plan& plan, const Task& task) { return plan.tiles[plan.members[task.first]]; }

// The long ones first, so that none ends alone; as they lie in memory where they are equally long.
void order(Plan* plan) {
  const auto key = [&](const Task& task) {
    const Tile& tile = tile_of(*plan, task);
    return std::make_tuple(-task.cost, tile.row, tile.first, task.begin, tile.kv_head);
  };
  std::stable_sort(plan->tasks.begin(), plan->tasks.end(),
                   [&](const Task& x, const Task& y) { return key(x) < key(y); });
}

// Small tiles of one row's heads whose chunks are the same.
void find_beside(const Attend& a, Plan* plan) {
  const auto few = [&](const Task& t) {
    const int64_t rows = rows_of(a, tile_of(*plan, t));  // of one alone, taking turns costs more than it gives
    return t.count == 1 && 1 < rows && rows <= kRowsBeside;
  };
  for (size_t i = plan->tasks.size(); i-- > 1;) {
    const Task &next = plan->tasks[i], &task = plan->tasks[i - 1];
    const Tile &x = tile_of(*plan, task), &y = tile_of(*plan, next);
    const bool same = x.row == y.row && x.first == y.first && x.kv_head + 1 == y.kv_head && task.begin == next.begin &&
                      task.end == next.end && (x.partials < 0) == (y.partials < 0);
    if (same && few(task) && few(next) && next.beside < kBeside) plan->tasks[i - 1].beside = next.beside + 1;
  }
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

void make_plan(const Attend& a, int threads, Plan* plan, int64_t least) {
  plan->tiles.clear();
  plan->members.clear();
  plan->tasks.clear();
  plan->cost = plan->most_rows = plan->partial_floats = 0;
  for (int64_t row = 0; row < a.rows; ++row) add_tiles(a, row, plan);
  Joiner(a, plan).add_tasks();
  if (threads > 1 && plan->cost >= std::max(least, kSerialCost)) {
    const int64_t share = std::max<int64_t>(1, plan->cost / (threads * kTasksPerThread));
    for (size_t i = 0, n = plan->tasks.size(); i < n; ++i) split(a, share, i, plan);
    order(plan);
  }
  find_beside(a, plan);
}

void attend_together(const Attend& a, const Plan& plan, float* partials, Turns* turns, const Member& me) {
  const Variant& kernels = chosen();
  float* scratch = scratch_buffer.reserve(kBeside * kernels.scratch_size(a, plan.most_rows));
  kernels.write(a, me.begin(a.written), me.end(a.written), scratch);
  if (me.index == 0) clear_padding(a);
  turns->tasks.deal(me, plan.tasks.size());
  turns->tiles.deal(me, plan.tiles.size());
  me.wait();
  const auto beside = [&](int64_t task) { return plan.tasks[task].beside; };
  for (Range now; !(now = turns->tasks.take(me, beside)).empty();) {
    Company companies[kBeside];
    for (int64_t i = now.begin; i < now.end; ++i)
      companies[i - now.begin] = {plan.tiles.data(), plan.members.data() + plan.tasks[i].first, plan.tasks[i].count};
    const Task& task = plan.tasks[now.begin];
    kernels.attend(a, companies, now.end - now.begin, task.begin, task.end, scratch, partials);
  }
  if (!plan.partial_floats) return;
  me.wait();
  const auto one = [](int64_t) { return 1; };
  for (Range now; !(now = turns->tiles.take(me, one)).empty();)
    if (plan.tiles[now.begin].partials >= 0) kernels.merge(a, plan.tiles[now.begin], scratch, partials);
}

void attend(const Attend& a, int threads) {
  check(a);
  static thread_local Plan plan;  // keeps its vectors' memory
  make_plan(a, threads, &plan, kTeamCost);
  Turns turns(threads);
  float* partials = partial_buffer.reserve(plan.partial_floats);
  if (threads == 1 || plan.cost < kTeamCost) return attend_together(a, plan, partials, &turns, Member{turns.barrier, 0, 1});
  const Plan& work = plan;
#pragma omp parallel num_threads(threads)
  attend_together(a, work, partials, &turns, Member{turns.barrier});
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
  const int64_t blocks = a.weight.blocks(), steps = a.rows > kRowsAtOnce ? kStepsOfMany : kStepsOfFew;
  const int64_t step = std::max<int64_t>(1, blocks / (me.count * steps));
  const auto at_once = [&](int64_t) { return step; };
  turns->blocks.deal(me, blocks);
  me.wait();
  for (Range now = turns->blocks.take(me, at_once), next; !now.empty(); now = next) {
    next = turns->blocks.take(me, at_once);  // already, so that it can be fetched meanwhile
    kernels.multiply(a, now.begin, now.end, next.empty() ? blocks : next.begin);
  }
  me.wait();
}

void linear(Linear a, int threads) {
  a.scratch = scratch_buffer.reserve(a.scratch_floats());
  Turns turns(threads);
  if (threads == 1 || a.weight.in * a.weight.out * (a.rows + kReadWeight) < kSerialProducts)
    return linear_together(a, &turns, Member{turns.barrier, 0, 1});
#pragma omp parallel num_threads(threads)
  linear_together(a, &turns, Member{turns.barrier});
}

}  // namespace keypast
