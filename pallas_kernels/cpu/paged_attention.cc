// Causal attention over a paged pool on a CPU, called through jax.ffi.
//
//   q            [T, N, H]      float32, the tokens of all rows, row after row
//   pool         [P, K, S, 2H]  float32 or bfloat16, keys in lanes 0..H-1, values behind them
//   tables       [B, M]         block ids of each row's context
//   query_starts [B + 1]        row r owns tokens query_starts[r] .. query_starts[r + 1] - 1
//   seq_lens     [B]            tokens of a row's context, its own queries the last of them
//   out          [T, N, H]      float32; zeros where a token sees nothing, padding among them
//
// A task is a few queries of one row with all the query heads of one KV head. It walks the context
// in tiles that stay in the L2 cache, with an online softmax (Milakov and Gimelshein, arXiv
// 1805.02867), and reads no slot behind its last query: slots that nobody owns may hold NaN.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {
namespace ffi = xla::ffi;

constexpr int64_t kVector = 16;    // floats; the compiler splits it where registers are shorter
constexpr int64_t kQueries = 16;   // tokens of a task: a tile is read once for all of them
constexpr int64_t kContext = 128;  // tokens of a tile
constexpr float kMasked = -1e30f;  // finite: -ffast-math knows no infinities

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef uint32_t Bits __attribute__((vector_size(4 * kVector)));
typedef uint16_t Halves __attribute__((vector_size(2 * kVector)));
struct BFloat16 { uint16_t bits; };

struct Problem {
  int64_t N, H, K, S, M;
  const float* q;
  const void* pool;
  const int32_t *tables, *query_starts, *seq_lens;
  float *out, scale, soft_cap;  // soft_cap 0: none
  int64_t window;               // 0: none
};

struct Task { int64_t row, head, first, count; };  // `count` queries, from token `first` on

int64_t whole_vectors(int64_t lanes) { return (lanes + kVector - 1) / kVector * kVector; }

// The next vector of a row of which `lanes` are left; zeros behind its end.
Vector load(const float* from, int64_t lanes) {
  Vector v = {};
  std::memcpy(&v, from, lanes < kVector ? sizeof(*from) * lanes : sizeof(v));
  return v;
}

Vector load(const BFloat16* from, int64_t lanes) {
  Halves v = {};
  std::memcpy(&v, from, lanes < kVector ? sizeof(*from) * lanes : sizeof(v));
  return (Vector)(__builtin_convertvector(v, Bits) << 16);
}

float sum(const Vector& v) {
  float total = 0;
  for (int i = 0; i < kVector; ++i) total += v[i];
  return total;
}

// logits[r][t] = q[r] . keys[t], for R rows of q padded to whole vectors.
template <int R, typename Size, typename KV>
void multiply_keys(const float* q, const KV* const* kv, int64_t tokens, Size H, float* logits) {
  const int64_t padded = whole_vectors(H);
  for (int64_t t = 0; t < tokens; ++t) {
    Vector sums[R] = {};
    for (int64_t h = 0; h < H; h += kVector) {
      const Vector key = load(kv[t] + h, H - h);
      for (int r = 0; r < R; ++r) sums[r] += load(q + r * padded + h, kVector) * key;
    }
    for (int r = 0; r < R; ++r) logits[r * kContext + t] = sum(sums[r]);
  }
}

// values[r] += weights[r][t] * v[t].
template <int R, typename Size, typename KV>
void add_values(const float* weights, const KV* const* kv, int64_t tokens, Size H, float* values) {
  const int64_t padded = whole_vectors(H);
  for (int64_t h = 0; h < H; h += kVector) {
    Vector sums[R];
    for (int r = 0; r < R; ++r) sums[r] = load(values + r * padded + h, kVector);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vector value = load(kv[t] + H + h, H - h);
      for (int r = 0; r < R; ++r) sums[r] += weights[r * kContext + t] * value;
    }
    for (int r = 0; r < R; ++r) std::memcpy(values + r * padded + h, &sums[r], sizeof(Vector));
  }
}

// One row's logits become weights, zero outside [begin, end); its sums follow the highest logit.
void soften(float* logits, int64_t tokens, int64_t begin, int64_t end, float soft_cap, float* high,
            float* total, float* values, int64_t padded) {
  begin = std::clamp<int64_t>(begin, 0, tokens), end = std::clamp(end, begin, tokens);
  float top = *high, weight = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (soft_cap) logits[t] = soft_cap * std::tanh(logits[t] / soft_cap);
    top = std::max(top, logits[t]);
  }
  for (int64_t t = begin; t < end; ++t) weight += logits[t] = std::exp(logits[t] - top);
  std::fill(logits, logits + begin, 0.0f);
  std::fill(logits + end, logits + tokens, 0.0f);
  const float shrink = std::exp(*high - top);
  for (int64_t h = 0; h < padded; ++h) values[h] *= shrink;
  *total = *total * shrink + weight, *high = top;
}

template <typename KV, typename Size>
void attend(const Problem& p, const Task& task, Size H) {
  const int64_t G = p.N / p.K, rows = task.count * G;  // a row is one query head of one token
  const int64_t padded = whole_vectors(H);
  // The first query's position; the positions that some query sees are [begin, end).
  const int64_t position = p.seq_lens[task.row] - p.query_starts[task.row + 1] + task.first;
  const int64_t begin = p.window ? std::max<int64_t>(0, position - p.window + 1) : 0;
  const int64_t end = position + task.count;
  const auto offset = [&](int64_t r) {
    return ((task.first + r / G) * p.N + task.head * G + r % G) * H;
  };
  std::vector<float> q(rows * padded), values(rows * padded), logits(rows * kContext);
  std::vector<float> high(rows, kMasked), total(rows);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < H; ++h) q[r * padded + h] = p.q[offset(r) + h] * p.scale;
  for (int64_t start = begin; start < end; start += kContext) {
    const int64_t tokens = std::min(kContext, end - start);
    const KV* kv[kContext];  // where each position's K|V lie
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t block = p.tables[task.row * p.M + (start + t) / p.S];
      const int64_t slot = (block * p.K + task.head) * p.S + (start + t) % p.S;
      kv[t] = static_cast<const KV*>(p.pool) + slot * 2 * H;
    }
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      multiply_keys<4>(&q[r * padded], kv, tokens, H, &logits[r * kContext]);
    for (; r < rows; ++r) multiply_keys<1>(&q[r * padded], kv, tokens, H, &logits[r * kContext]);
    for (r = 0; r < rows; ++r) {
      const int64_t own = position + r / G - start;  // where this row's token is in the tile
      soften(&logits[r * kContext], tokens, p.window ? own - p.window + 1 : 0, own + 1, p.soft_cap,
             &high[r], &total[r], &values[r * padded], padded);
    }
    for (r = 0; r + 4 <= rows; r += 4)
      add_values<4>(&logits[r * kContext], kv, tokens, H, &values[r * padded]);
    for (; r < rows; ++r) add_values<1>(&logits[r * kContext], kv, tokens, H, &values[r * padded]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float scale = total[r] > 0 ? 1 / total[r] : 0;
    for (int64_t h = 0; h < H; ++h) p.out[offset(r) + h] = values[r * padded + h] * scale;
  }
}

// The common head sizes are known to the compiler.
template <typename KV>
void attend_any(const Problem& p, const Task& task) {
  if (p.H == 64) return attend<KV>(p, task, std::integral_constant<int64_t, 64>());
  if (p.H == 128) return attend<KV>(p, task, std::integral_constant<int64_t, 128>());
  attend<KV>(p, task, p.H);
}

// Tasks that the caller and its helpers take until none is left. A helper may wake up late, so it
// holds the queue too, and touches nothing else unless it got a task.
struct Queue {
  std::function<void(int64_t)> run;
  int64_t tasks;
  std::atomic<int64_t> next{0}, done{0};
  void drain() { for (int64_t i; (i = next++) < tasks; ++done) run(i); }
};

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

ffi::Error paged_attention(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Ints tables,
                           Ints query_starts, Ints seq_lens, ffi::Result<Floats> out, float scale,
                           int64_t window, float soft_cap) {
  const int64_t B = tables.dimensions()[0], N = q.dimensions()[1], H = q.dimensions()[2];
  const int64_t K = pool.dimensions()[1], S = pool.dimensions()[2], M = tables.dimensions()[1];
  const int32_t* starts = query_starts.typed_data();
  const Problem p = {N, H, K, S, M, q.typed_data(), pool.untyped_data(), tables.typed_data(),
                     starts, seq_lens.typed_data(), out->typed_data(), scale, soft_cap, window};
  const auto attend = pool.element_type() == ffi::BF16 ? attend_any<BFloat16> : attend_any<float>;
  std::vector<Task> tasks;
  for (int64_t row = 0; row < B; ++row)
    for (int64_t first = starts[row]; first < starts[row + 1]; first += kQueries)
      for (int64_t head = 0; head < K; ++head)
        tasks.push_back({row, head, first, std::min(kQueries, starts[row + 1] - first)});
  std::fill(p.out + starts[B] * N * H, p.out + out->element_count(), 0.0f);

  const auto queue = std::make_shared<Queue>();
  queue->run = [&](int64_t i) { attend(p, tasks[i]); };
  queue->tasks = tasks.size();
  for (int64_t i = 1; i < std::min(threads.num_threads(), queue->tasks); ++i)
    threads.Schedule([queue] { queue->drain(); });
  queue->drain();
  while (queue->done < queue->tasks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_paged_attention, paged_attention,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Ints>()
        .Arg<Ints>().Arg<Ints>().Ret<Floats>().Attr<float>("scale").Attr<int64_t>("window")
        .Attr<float>("soft_cap"));
