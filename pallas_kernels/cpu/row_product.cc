// The product of one row and a matrix, in bfloat16, on a CPU, called through jax.ffi.
//
//   x       [1, D]  bfloat16
//   matrix  [D, V]  bfloat16, or [V, D] where is_transposed
//   out     [1, V]  float32, in which the products are summed
//
// One row is bound by reading the matrix. XLA has no product for it but one of two rows and more,
// which packs the matrix first: that reads and writes it once more.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace {
namespace ffi = xla::ffi;

constexpr int64_t kVector = 16;  // floats; the compiler splits it where registers are shorter
constexpr int64_t kRows = 8;     // of [D, V], read side by side
constexpr int64_t kTasks = 8;    // of a call, however many threads there are: sums are the same

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef uint32_t Bits __attribute__((vector_size(4 * kVector)));
typedef uint16_t Halves __attribute__((vector_size(2 * kVector)));

struct Call {
  int64_t D, V;
  const uint16_t *x, *matrix;
  float* out;
  std::vector<float> sums = {};  // of each task, where they take rows of [D, V]
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

// The task's sum over d of x[d] * matrix[d]: its rows lie one behind the other, which is how a
// processor foresees best what will be read.
void by_columns(Call& call, int64_t task) {
  const int64_t first = call.D * task / kTasks, end = call.D * (task + 1) / kTasks;
  const int64_t whole = call.V / kVector * kVector;
  float* sums = &call.sums[task * call.V];
  for (int64_t d = first; d < end; d += kRows) {
    float x[kRows] = {};
    const uint16_t* from[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t own = std::min(d + r, end - 1);  // behind the last row, it again, times 0
      if (d + r < end) x[r] = widen(call.x[own]);
      from[r] = call.matrix + own * call.V;
    }
    for (int64_t v = 0; v < whole; v += kVector) {
      Vector sum;
      std::memcpy(&sum, sums + v, sizeof(sum));
      for (int64_t r = 0; r < kRows; ++r) sum += x[r] * load(from[r] + v);
      std::memcpy(sums + v, &sum, sizeof(sum));
    }
    for (int64_t v = whole; v < call.V; ++v)
      for (int64_t r = 0; r < kRows; ++r) sums[v] += x[r] * widen(from[r][v]);
  }
}

// out[v] = x . matrix[v], for the task's part of them.
void by_rows(Call& call, int64_t task) {
  const int64_t first = call.V * task / kTasks, end = call.V * (task + 1) / kTasks;
  for (int64_t v = first; v < end; ++v) {
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
  Call call{D, V, reinterpret_cast<const uint16_t*>(x.typed_data()),
            reinterpret_cast<const uint16_t*>(matrix.typed_data()), out->typed_data()};
  if (!is_transposed) call.sums.resize(kTasks * V);
  const auto multiply = is_transposed ? by_rows : by_columns;
  share(threads, kTasks, [&](int64_t task) { multiply(call, task); });
  if (is_transposed) return ffi::Error::Success();
  for (int64_t v = 0; v < V; ++v) {
    float total = 0;
    for (int64_t task = 0; task < kTasks; ++task) total += call.sums[task * V + v];
    call.out[v] = total;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_row_product, row_product,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>()
        .Ret<ffi::BufferR2<ffi::F32>>().Attr<bool>("is_transposed"));
