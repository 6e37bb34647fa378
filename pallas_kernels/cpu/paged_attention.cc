// Causal attention over a paged pool on a CPU, called through jax.ffi.
//
//   q            [T, N, H]      float32, the tokens of all rows, row after row
//   pool         [P, K, S, 2H]  of KV, which the compiler is told: float, BFloat16, int8_t or Float8
//                               (e4m3fn); keys in lanes 0..H-1, values behind them
//   tables       [B, M]         block ids of each row's context
//   query_starts [B + 1]        row r owns tokens query_starts[r] .. query_starts[r + 1] - 1
//   seq_lens     [B]            tokens of a row's context, its own queries the last of them
//   sinks        [N]            logits that take weight and have no value; none is kMasked
//   kv_scales    [2, K]         what the pool's keys and values are to be multiplied by
//   out          [T, N, H]      float32; zeros where a token sees nothing, padding among them
//   window       how many tokens one sees, itself the last; no window is one as long as any context
//   soft_cap     logits become soft_cap * tanh(logits / soft_cap), but for 0, which is no cap
//
// A task is a few queries of one row with all the query heads of one KV head. It walks the context
// in tiles that stay in the L2 cache, with an online softmax (Milakov and Gimelshein, arXiv
// 1805.02867), and reads no slot behind its last query: slots that nobody owns may hold NaN.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace {
namespace ffi = xla::ffi;

constexpr int64_t kVector = 16;    // floats; the compiler splits it where registers are shorter
constexpr int64_t kQueries = 16;   // tokens of a task: a tile is read once for all of them
constexpr int64_t kTile = 128;     // tokens of a tile
constexpr int64_t kLine = 64;      // bytes of a cache line
constexpr int64_t kAhead = 16;     // tokens; what lies behind is on its way into the L2 cache
constexpr float kMasked = -1e30f;  // finite: -ffast-math knows no infinities

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef uint32_t Bits __attribute__((vector_size(4 * kVector)));
typedef uint16_t Halves __attribute__((vector_size(2 * kVector)));
typedef uint8_t Quarters __attribute__((vector_size(kVector)));
typedef int8_t Integers __attribute__((vector_size(kVector)));
struct BFloat16 { uint16_t bits; };
struct Float8 { uint8_t bits; };  // e4m3fn: no infinities, and a NaN for each sign

struct Task { int64_t row, head, first, count; };  // `count` queries, from token `first` on

struct Call {
  int64_t N, H, K, S, M;
  const float* q;
  const void* pool;
  const int32_t *tables, *query_starts, *seq_lens;
  const float *sinks, *kv_scales;
  float *out, scale, soft_cap;
  int64_t window;
};

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

Vector load(const int8_t* from, int64_t lanes) {
  Integers v = {};
  std::memcpy(&v, from, lanes < kVector ? lanes : sizeof(v));
  return __builtin_convertvector(v, Vector);
}

// A significand of four bits times a power of two: a subnormal is as good as another number, where
// one shifted into a float's place would be flushed to zero by processors told to do so.
Vector load(const Float8* from, int64_t lanes) {
  Quarters v = {};
  std::memcpy(&v, from, lanes < kVector ? lanes : sizeof(v));
  const Bits bits = __builtin_convertvector(v, Bits), magnitude = bits & 127;
  const Bits exponent = (magnitude >> 3) + ((Bits)(magnitude < 8) & 1);
  const Vector power = (Vector)((exponent + 117) << 23);  // 2 ** (exponent - 10)
  const Vector value = __builtin_convertvector(magnitude - ((exponent - 1) << 3), Vector) * power;
  const Bits nan = (Bits)(magnitude == 127) & 0x7fc00000;
  return (Vector)((Bits)value | (bits & 128) << 24 | nan);
}

// logits[r][t] = q[r] . keys[t], for R rows of q padded to whole vectors. Blocks lie anywhere, so the
// processor cannot foresee them: what kAhead tokens later is needed, keys and values, is asked for.
template <int R, typename Size>
void multiply_keys(const float* q, const KV* const* kv, int64_t tokens, Size H, float* logits) {
  const int64_t padded = whole_vectors(H);
  for (int64_t t = 0; t < tokens; ++t) {
    Vector sums[R] = {};
    for (int64_t h = 0; h < 2 * H; h += kLine / sizeof(KV))
      __builtin_prefetch(kv[t + kAhead] + h, 0, 2);  // to be read, and not from the L1 cache
    for (int64_t h = 0; h < H; h += kVector) {
      const Vector key = load(kv[t] + h, H - h);
      for (int r = 0; r < R; ++r) sums[r] += load(q + r * padded + h, kVector) * key;
    }
    for (int r = 0; r < R; ++r) {
      float& logit = logits[r * kTile + t] = 0;
      for (int lane = 0; lane < kVector; ++lane) logit += sums[r][lane];
    }
  }
}

// values[r] += weights[r][t] * v[t].
template <int R, typename Size>
void add_values(const float* weights, const KV* const* kv, int64_t tokens, Size H, float* values) {
  const int64_t padded = whole_vectors(H);
  for (int64_t h = 0; h < H; h += kVector) {
    Vector sums[R];
    for (int r = 0; r < R; ++r) sums[r] = load(values + r * padded + h, kVector);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vector value = load(kv[t] + H + h, H - h);
      for (int r = 0; r < R; ++r) sums[r] += weights[r * kTile + t] * value;
    }
    for (int r = 0; r < R; ++r) std::memcpy(values + r * padded + h, &sums[r], sizeof(Vector));
  }
}

// Logits of the row whose token is the tile's `own` become weights; sums follow the highest logit.
void soften(const Call& call, int64_t own, int64_t tokens, float* logits, float* high, float* total,
            float* values, int64_t padded) {
  const int64_t end = std::clamp<int64_t>(own + 1, 0, tokens);
  const int64_t begin = std::clamp<int64_t>(own + 1 - call.window, 0, end);
  float top = *high, weight = 0, cap = call.soft_cap;
  for (int64_t t = begin; t < end; ++t) {
    if (cap) logits[t] = cap * std::tanh(logits[t] / cap);
    top = std::max(top, logits[t]);
  }
  for (int64_t t = begin; t < end; ++t) weight += logits[t] = std::exp(logits[t] - top);
  std::fill(logits, logits + begin, 0.0f);
  std::fill(logits + end, logits + tokens, 0.0f);
  const float shrink = std::exp(*high - top);
  for (int64_t h = 0; h < padded; ++h) values[h] *= shrink;
  *total = *total * shrink + weight, *high = top;
}

// kv[i] = where the K|V of position `first + i` lie, for all positions before `end`; behind them, up
// to `size`, the last one again. Divisions, slow ones, are made once a block.
void find(const Call& call, const Task& task, int64_t first, int64_t end, int64_t size,
          const KV** kv) {
  int64_t i = 0;
  while (i < std::min(size, end - first)) {
    const int64_t block = call.tables[task.row * call.M + (first + i) / call.S];
    const int64_t offset = (first + i) % call.S;
    const int64_t stop = std::min({i + call.S - offset, size, end - first});
    const KV* from = static_cast<const KV*>(call.pool) +
                     ((block * call.K + task.head) * call.S + offset) * 2 * call.H;
    for (; i < stop; ++i, from += 2 * call.H) kv[i] = from;
  }
  std::fill(kv + i, kv + size, kv[i - 1]);
}

// visit(R, r) for rows r .. r + R - 1, which read each key and value once for all of them.
template <typename Visit>
void by_rows(int64_t rows, Visit visit) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) visit(std::integral_constant<int, 4>(), r);
  if (rows - r == 3) visit(std::integral_constant<int, 3>(), r);
  if (rows - r == 2) visit(std::integral_constant<int, 2>(), r);
  if (rows - r == 1) visit(std::integral_constant<int, 1>(), r);
}

template <typename Size>
void attend(const Call& call, const Task& task, Size H) {
  const int64_t G = call.N / call.K, rows = task.count * G;  // a row is one query head of one token
  const int64_t padded = whole_vectors(H);
  // The first query's position; the positions that some query sees are [begin, end).
  const int64_t own = call.seq_lens[task.row] - call.query_starts[task.row + 1] + task.first;
  const int64_t begin = std::max<int64_t>(0, own + 1 - call.window), end = own + task.count;
  const int64_t corner = (task.first * call.N + task.head * G) * H;  // in q and out
  const auto offset = [&](int64_t r) { return corner + (r / G * call.N + r % G) * H; };
  std::vector<float> q(rows * padded), values(rows * padded), logits(rows * kTile);
  std::vector<float> high(rows, kMasked), total(rows);
  const float key_scale = call.kv_scales[task.head] * call.scale;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < H; ++h) q[r * padded + h] = call.q[offset(r) + h] * key_scale;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t tokens = std::min(kTile, end - start);
    const KV* kv[kTile + kAhead];
    find(call, task, start, end, tokens + kAhead, kv);
    by_rows(rows, [&](auto R, int64_t r) {
      multiply_keys<R>(&q[r * padded], kv, tokens, H, &logits[r * kTile]);
    });
    for (int64_t r = 0; r < rows; ++r)
      soften(call, own + r / G - start, tokens, &logits[r * kTile], &high[r], &total[r],
             &values[r * padded], padded);
    by_rows(rows, [&](auto R, int64_t r) {
      add_values<R>(&logits[r * kTile], kv, tokens, H, &values[r * padded]);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float sink = call.sinks[task.head * G + r % G], top = std::max(high[r], sink);
    const float shrink = std::exp(high[r] - top);
    const float weights = total[r] * shrink + std::exp(sink - top);  // the sink's or a token's is 1
    const float scale = call.kv_scales[call.K + task.head] * shrink / weights;
    for (int64_t h = 0; h < H; ++h) call.out[offset(r) + h] = values[r * padded + h] * scale;
  }
}

// The common head sizes are known to the compiler.
void attend_any(const Call& call, const Task& task) {
  if (call.H == 64) return attend(call, task, std::integral_constant<int64_t, 64>());
  if (call.H == 128) return attend(call, task, std::integral_constant<int64_t, 128>());
  attend(call, task, call.H);
}

ffi::Error invalid(std::string name, int64_t row, int64_t low, int64_t high, int64_t came) {
  return ffi::Error::InvalidArgument(
      name + " of row " + std::to_string(row) + " must be from " + std::to_string(low) + " to " +
      std::to_string(high) + ", got " + std::to_string(came));
}

using Floats = ffi::BufferR3<ffi::F32>;
template <size_t rank> using Ints = ffi::Buffer<ffi::S32, rank>;

// Numbers that would lead outside the arrays are refused. A row without queries reads nothing.
ffi::Error paged_attention(ffi::ThreadPool threads, Floats q, ffi::AnyBuffer pool, Ints<2> tables,
                           Ints<1> query_starts, Ints<1> seq_lens, ffi::BufferR1<ffi::F32> sinks,
                           ffi::BufferR2<ffi::F32> kv_scales, ffi::Result<Floats> out, float scale,
                           int64_t window, float soft_cap) {
  const auto queries = q.dimensions(), blocks = pool.dimensions(), rows = tables.dimensions();
  const int64_t T = queries[0], P = blocks[0], K = blocks[1], S = blocks[2], M = rows[1];
  const Call call{
      queries[1], queries[2], K, S, M, q.typed_data(), pool.untyped_data(), tables.typed_data(),
      query_starts.typed_data(), seq_lens.typed_data(), sinks.typed_data(), kv_scales.typed_data(),
      out->typed_data(), scale, soft_cap, window};
  std::vector<Task> tasks;
  int64_t end = 0;  // of the row's queries
  for (int64_t row = 0; row < rows[0]; ++row) {
    const int64_t start = call.query_starts[row], length = call.seq_lens[row];
    if (start != end) return invalid("q has rows in order: the start", row, end, end, start);
    end = call.query_starts[row + 1];
    if (end < start || end > T) return invalid("q has rows in order: the end", row, start, T, end);
    if (end == start) continue;
    if (length < 0 || length > M * S)
      return invalid("block_tables have a row's context: seq_lens", row, 0, M * S, length);
    const int64_t seen = std::max<int64_t>(0, length + start - end + 1 - window);
    for (int64_t m = seen / S; m * S < length; ++m)
      if (const int64_t block = call.tables[row * M + m]; block < 0 || block >= P)
        return invalid("the pool has a table's blocks: a block id", row, 0, P - 1, block);
    for (int64_t first = start; first < end; first += kQueries)
      for (int64_t head = 0; head < K; ++head)
        tasks.push_back({row, head, first, std::min(kQueries, end - first)});
  }
  std::fill(call.out + end * queries[1] * queries[2], call.out + q.element_count(), 0.0f);
  share(threads, tasks.size(), [&](int64_t i) { attend_any(call, tasks[i]); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_paged_attention, paged_attention,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<Ints<2>>()
        .Arg<Ints<1>>().Arg<Ints<1>>().Arg<ffi::BufferR1<ffi::F32>>()
        .Arg<ffi::BufferR2<ffi::F32>>().Ret<Floats>().Attr<float>("scale").Attr<int64_t>("window")
        .Attr<float>("soft_cap"));
