// The product of one row and a matrix, in bfloat16, on a CPU, called through jax.ffi.
//
//   x       [1, D]  bfloat16
//   matrix  [D, V]  bfloat16, or [V, D] where is_transposed
//   out     [1, V]  float32, in which the products are summed
//
// One row is bound by reading the matrix. XLA has no product for it but one of two rows and more,
// which packs the matrix first: that reads and writes it once more.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {
namespace ffi = xla::ffi;

constexpr int64_t kVector = 16;   // floats; the compiler splits it where registers are shorter
constexpr int64_t kRows = 16;     // of the matrix, read side by side
constexpr int64_t kTask = 1024;   // elements of out at most; the sums stay in the L1 cache
constexpr int64_t kShares = 4;    // of a thread, where there is enough: others may be late

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef uint32_t Bits __attribute__((vector_size(4 * kVector)));
typedef uint16_t Halves __attribute__((vector_size(2 * kVector)));

// One call, whose tasks the caller and its helpers take until none is left. A helper may wake up
// late, so it holds the call too, and touches no array unless it got a task.
struct Call {
  int64_t D, V, size, num_tasks;
  const uint16_t *x, *matrix;
  float* out;
  void (*multiply)(const Call&, int64_t first, int64_t count);
  std::atomic<int64_t> next{0}, done{0};
  void drain() {
    for (int64_t i; (i = next++) < num_tasks; ++done)
      multiply(*this, i * size, std::min(size, V - i * size));
  }
};

float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

Vector load(const uint16_t* from) {
  Halves v;
  std::memcpy(&v, from, sizeof(v));
  return (Vector)(__builtin_convertvector(v, Bits) << 16);
}

// out[first ..] = sum over d of x[d] * matrix[d], kRows of them at a time.
void columns(const Call& call, int64_t first, int64_t count) {
  const int64_t whole = count / kVector * kVector;
  alignas(64) float sums[kTask] = {};
  for (int64_t d = 0; d < call.D; d += kRows) {
    float x[kRows] = {};
    const uint16_t* from[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t own = std::min(d + r, call.D - 1);  // behind the last row, it again, times 0
      if (d + r < call.D) x[r] = widen(call.x[own]);
      from[r] = call.matrix + own * call.V + first;
    }
    for (int64_t c = 0; c < whole; c += kVector) {
      Vector sum;
      std::memcpy(&sum, sums + c, sizeof(sum));
      for (int64_t r = 0; r < kRows; ++r) sum += x[r] * load(from[r] + c);
      std::memcpy(sums + c, &sum, sizeof(sum));
    }
    for (int64_t c = whole; c < count; ++c)
      for (int64_t r = 0; r < kRows; ++r) sums[c] += x[r] * widen(from[r][c]);
  }
  std::memcpy(call.out + first, sums, count * sizeof(float));
}

// out[v] = x . matrix[v].
void rows(const Call& call, int64_t first, int64_t count) {
  for (int64_t v = first; v < first + count; ++v) {
    const uint16_t* from = call.matrix + v * call.D;
    Vector sums[4] = {};
    int64_t d = 0;
    for (; d + 4 * kVector <= call.D; d += 4 * kVector)
      for (int64_t i = 0; i < 4 * kVector; i += kVector)
        sums[i / kVector] += load(call.x + d + i) * load(from + d + i);
    const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int64_t lane = 0; lane < kVector; ++lane) total += sum[lane];
    for (; d < call.D; ++d) total += widen(call.x[d]) * widen(from[d]);
    call.out[v] = total;
  }
}

using Matrix = ffi::BufferR2<ffi::BF16>;

ffi::Error row_product(ffi::ThreadPool threads, Matrix x, Matrix matrix,
                       ffi::Result<ffi::BufferR2<ffi::F32>> out, bool is_transposed) {
  const int64_t D = x.dimensions()[1], V = out->dimensions()[1];
  const int64_t share = (V / (kShares * threads.num_threads()) + kVector) / kVector * kVector;
  const int64_t size = std::min(kTask, share);
  const std::shared_ptr<Call> call(new Call{
      D, V, size, (V + size - 1) / size, reinterpret_cast<const uint16_t*>(x.typed_data()),
      reinterpret_cast<const uint16_t*>(matrix.typed_data()), out->typed_data(),
      is_transposed ? rows : columns});
  for (int64_t i = 1; i < std::min<int64_t>(threads.num_threads(), call->num_tasks); ++i)
    threads.Schedule([call] { call->drain(); });
  call->drain();
  while (call->done < call->num_tasks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_row_product, row_product,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>()
        .Ret<ffi::BufferR2<ffi::F32>>().Attr<bool>("is_transposed"));
