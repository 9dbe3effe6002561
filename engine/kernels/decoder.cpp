// Every block of a decoder, by one team of threads from the first norm to the last linear: it waits for its slowest
// member some ten times a block and otherwise reads weights.
#include <algorithm>

#include "drive.h"

namespace keypast {

namespace {

thread_local Buffer input_buffer, value_buffer, partial_buffer;

Rows rows_of(void* data, int64_t width) { return {data, 1, width, 0}; }

// What all blocks and members work on; `d` has the rest.
struct Work {
  const Decoder& d;
  const Plan& plan;
  float* partials;
  Turns* turns;
  float* inputs;  // of a linear, prepared
  void *normed, *gate_up, *inner;  // (tokens, hidden), (tokens, 2 * inner), (tokens, inner)
};

class Runner {
 public:
  Runner(const Work& work, const Member& me)
      : w(work),
        d(work.d),
        a(work.d.attend),
        kernels(chosen()),
        me(me),
        begin(me.begin(a.tokens)),
        end(me.end(a.tokens)) {}

  void run() {
    for (int64_t layer = 0; layer < d.layers; ++layer) {
      const DecoderBlock& block = d.blocks[layer];
      norm(block.attention_norm, layer > 0);
      linear(block.qkv, w.normed, d.qkv);
      attend(block, layer);
      linear(block.o_proj, a.out, d.delta);
      norm(block.feed_forward_norm, true);
      linear(block.gate_up, w.normed, w.gate_up);
      gate();
      linear(block.down_proj, w.inner, d.delta);
    }
  }

 private:
  // Norms, gates and prepared inputs are of a member's own rows, which nobody else reads before linear() has waited.
  void norm(void* weight, bool add) const {
    Norm n{};
    n.x = rows_of(add ? d.delta : d.x, d.hidden), n.weight = weight, n.out = w.normed;
    if (add) n.residual = rows_of(d.x, d.hidden), n.sum = d.x;
    n.dtype = a.dtype, n.weight_dtype = d.norm_dtype, n.rows = a.tokens, n.width = d.hidden, n.eps = d.eps;
    kernels.rms_norm(n, begin, end);
  }

  void linear(const Weight& weight, void* x, void* out) const {
    linear_together({weight, rows_of(x, weight.in), out, a.dtype, a.dtype, a.tokens, w.inputs}, w.turns, me);
  }

  void head_norm(void* weight, int64_t first, int64_t heads, const Heads& out) const {
    if (!weight) return;
    const int64_t width = a.heads + 2 * a.kv_heads, bytes = bytes_of(a.dtype);
    Norm n{};
    n.x = {static_cast<char*>(d.qkv) + first * a.head_dim * bytes, heads, width * a.head_dim, a.head_dim};
    n.weight = weight, n.out = out.data, n.dtype = a.dtype, n.weight_dtype = d.norm_dtype;
    n.rows = a.tokens * heads, n.width = a.head_dim, n.eps = d.eps;
    kernels.rms_norm(n, begin * heads, end * heads);
  }

  void attend(const DecoderBlock& block, int64_t layer) const {
    head_norm(block.q_norm, 0, a.heads, a.q);
    head_norm(block.k_norm, a.heads, a.kv_heads, a.k);
    Attend own = a;
    own.k_blocks.data = static_cast<char*>(a.k_blocks.data) + layer * d.k_layer_bytes;
    own.v_blocks.data = static_cast<char*>(a.v_blocks.data) + layer * d.v_layer_bytes;
    attend_together(own, w.plan, w.partials, w.turns, me);
    me.wait();
  }

  void gate() const {
    const Gate g{rows_of(w.gate_up, 2 * d.inner), w.inner, a.dtype, a.tokens, d.inner};
    kernels.silu_gate(g, begin, end);
  }

  const Work& w;
  const Decoder& d;
  const Attend& a;
  const Variant& kernels;
  const Member me;
  const int64_t begin, end;  // own rows
};

int64_t most_scratch(const DecoderBlock& b, int64_t rows) {  // blocks are alike
  int64_t most = 0;
  for (const Weight* weight : {&b.qkv, &b.o_proj, &b.gate_up, &b.down_proj}) {
    Linear l{};
    l.weight = *weight, l.rows = rows;
    most = std::max(most, l.scratch_floats());
  }
  return most;
}

}  // namespace

void decoder(const Decoder& d, int threads) {
  static thread_local Plan plan;  // keeps its vectors' memory
  check(d.attend);
  make_plan(d.attend, threads, &plan);
  Turns turns(threads);
  Work work{d, plan, partial_buffer.reserve(plan.partial_floats), &turns};
  const int64_t tokens = d.attend.tokens;
  work.inputs = input_buffer.reserve(most_scratch(d.blocks[0], tokens));
  work.normed = value_buffer.reserve(tokens * (d.hidden + 3 * d.inner));
  work.gate_up = static_cast<float*>(work.normed) + tokens * d.hidden;
  work.inner = static_cast<float*>(work.gate_up) + tokens * 2 * d.inner;
#pragma omp parallel num_threads(threads)
  Runner(work, Member{turns.barrier}).run();
}

}  // namespace keypast
