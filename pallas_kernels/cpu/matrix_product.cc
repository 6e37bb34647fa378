// The product of rows and a matrix, in bfloat16, on a CPU, called through jax.ffi.
//
//   x       [T, D]  bfloat16
//   matrix  [D, V]  bfloat16, or [V, D] where is_transposed
//   out     [T, V]  float32 or bfloat16; products are summed in float32, in order, so that a row's
//                   bits do not depend on the other rows
//
// The instruction multiplies pairs along D: vdpbf16ps, of AVX512_BF16. XLA packs the whole matrix
// into such pairs at each call, writes it and reads it again. Here a task packs a panel of a few
// columns, small enough for the L1 cache, and multiplies all rows with it. Meanwhile the first of
// them ask for the next panel, the columns beside it: no processor foresees such a walk.

#ifndef __AVX512BF16__
#error "this processor has no AVX512_BF16"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace {
namespace ffi = xla::ffi;

constexpr int64_t kVector = 16;            // floats, or pairs
constexpr int64_t kVectors = 2;            // side by side in a panel
constexpr int64_t kColumns = kVectors * kVector;
constexpr int64_t kRows = 12;              // whose sums are kept in registers: 24 of the 32
constexpr int64_t kPair = 2;
constexpr int64_t kLine = 64;              // bytes of a cache line

struct Call {
  int64_t T, D, V;
  const uint16_t *x, *matrix;
  void* out;
  bool is_transposed, is_narrow;

  // Where a panel begins, and the bytes from one of its lines in memory to the next.
  const uint16_t* begin(int64_t panel) const {
    return matrix + panel * kColumns * (is_transposed ? D : 1);
  }
  int64_t stride() const { return is_transposed ? kLine : V * int64_t(sizeof(uint16_t)); }
};

// A mask of the first `left` of 16 or 32 lanes.
__mmask32 first_lanes(int64_t left, int64_t lanes) {
  return left >= lanes ? ~__mmask32(0) : left > 0 ? (__mmask32(1) << left) - 1 : 0;
}

// Fills to[pair][column][2] from a matrix [D, V]; zeros behind its ends.
void pack_rows(const Call& call, int64_t panel, uint16_t* to) {
  static_assert(kColumns == 32, "a row of a panel is one vector of 16 bits");
  alignas(kLine) uint16_t order[2 * kColumns];  // lane i of the first row, lane i of the second
  for (uint16_t i = 0; i < 2 * kColumns; ++i) order[i] = i / 2 + i % 2 * kColumns;
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + kColumns);
  const uint16_t* from = call.begin(panel);
  const __mmask32 mask = first_lanes(call.V - panel * kColumns, kColumns);
  for (int64_t d = 0; d < call.D; d += kPair, from += kPair * call.V, to += kPair * kColumns) {
    const bool has_second = d + 1 < call.D;
    const __m512i first = _mm512_maskz_loadu_epi16(mask, from);
    const __m512i second =
        _mm512_maskz_loadu_epi16(has_second ? mask : 0, from + (has_second ? call.V : 0));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
    _mm512_store_si512(to + kColumns, _mm512_permutex2var_epi16(first, high, second));
  }
}

// Turns 16 rows of 16 pairs into columns.
void transpose(__m512i rows[kVector]) {
  __m512i other[kVector];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 16; j += 8) {
      other[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
      other[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 8; j += 4) {
      rows[i + j] = _mm512_shuffle_i32x4(other[i + j], other[i + j + 8], 0x88);
      rows[i + j + 8] = _mm512_shuffle_i32x4(other[i + j], other[i + j + 8], 0xdd);
    }
}

// The same from a matrix [V, D].
void pack_columns(const Call& call, int64_t panel, uint16_t* to) {
  for (int64_t v = 0; v < kColumns; v += kVector)
    for (int64_t d = 0; d < call.D; d += kPair * kVector) {
      __m512i rows[kVector];
      for (int64_t i = 0; i < kVector; ++i) {
        const bool is_there = panel * kColumns + v + i < call.V;
        const __mmask32 mask = is_there ? first_lanes(call.D - d, kPair * kVector) : 0;
        const uint16_t* from = call.begin(panel) + (is_there ? v + i : 0) * call.D + d;
        rows[i] = _mm512_maskz_loadu_epi16(mask, from);
      }
      transpose(rows);
      for (int64_t i = 0; i < kVector && d + kPair * i < call.D; ++i)
        _mm512_store_si512(to + ((d / kPair + i) * kColumns + v) * kPair, rows[i]);
    }
}

__m512bh pair_of(const uint16_t* x, int64_t left) {
  uint32_t bits = 0;
  std::memcpy(&bits, x, left > 1 ? sizeof(bits) : sizeof(*x));
  return (__m512bh)_mm512_set1_epi32(bits);
}

// R rows, from `row` on, times a panel; meanwhile two lines at `ahead` are asked for with each pair.
template <int R>
void multiply(const Call& call, int64_t row, int64_t panel, const uint16_t* packed,
              const char* ahead) {
  __m512 sums[R][kVectors] = {};
  const auto add = [&](int64_t pair, int64_t left) {
    __m512bh columns[kVectors];
    for (int64_t v = 0; v < kVectors; ++v)
      columns[v] = (__m512bh)_mm512_load_si512(packed + (pair * kVectors + v) * kPair * kVector);
    for (int r = 0; r < R; ++r) {
      const __m512bh x = pair_of(call.x + (row + r) * call.D + pair * kPair, left);
      for (int64_t v = 0; v < kVectors; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, columns[v]);
    }
  };
  for (int64_t pair = 0; pair < call.D / kPair; ++pair) {
    if (ahead != nullptr) {
      __builtin_prefetch(ahead + pair * kPair * call.stride(), 0, 2);
      __builtin_prefetch(ahead + (pair * kPair + 1) * call.stride(), 0, 2);
    }
    add(pair, kPair);
  }
  if (call.D % kPair) add(call.D / kPair, 1);
  for (int r = 0; r < R; ++r)
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t column = panel * kColumns + v * kVector, at = (row + r) * call.V + column;
      const __mmask16 mask = first_lanes(call.V - column, kVector);
      if (call.is_narrow)
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(call.out) + at, mask,
                                 (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
      else
        _mm512_mask_storeu_ps(static_cast<float*>(call.out) + at, mask, sums[r][v]);
    }
}

using Multiply = void (*)(const Call&, int64_t, int64_t, const uint16_t*, const char*);
constexpr Multiply kMultiply[kRows + 1] = {
    nullptr,     multiply<1>, multiply<2>, multiply<3>,  multiply<4>,  multiply<5>, multiply<6>,
    multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>};

// All rows times the panels from `first` to `end` - 1.
void multiply_panels(const Call& call, int64_t first, int64_t end) {
  static thread_local std::vector<uint16_t> space;
  space.resize((call.D + 1) / kPair * kPair * kColumns + kLine);
  const auto address = reinterpret_cast<uintptr_t>(space.data());
  auto* packed = reinterpret_cast<uint16_t*>((address + kLine - 1) / kLine * kLine);
  const int64_t turns = (call.T + kRows - 1) / kRows;
  for (int64_t panel = first; panel < end; ++panel) {
    (call.is_transposed ? pack_columns : pack_rows)(call, panel, packed);
    const auto* ahead = reinterpret_cast<const char*>(call.begin(panel + 1));
    for (int64_t turn = 0; turn < turns; ++turn) {  // of as many rows as the others, or one more
      const int64_t row = call.T * turn / turns, stop = call.T * (turn + 1) / turns;
      const bool asks = turn == 0 && panel + 1 < end;
      kMultiply[stop - row](call, row, panel, packed, asks ? ahead : nullptr);
    }
  }
}

using Matrix = ffi::BufferR2<ffi::BF16>;

ffi::Error matrix_product(ffi::ThreadPool threads, Matrix x, Matrix matrix,
                          ffi::Result<ffi::AnyBuffer> out, bool is_transposed) {
  const int64_t V = out->dimensions()[1];
  const Call call{x.dimensions()[0], x.dimensions()[1], V,
                  reinterpret_cast<const uint16_t*>(x.typed_data()),
                  reinterpret_cast<const uint16_t*>(matrix.typed_data()), out->untyped_data(),
                  is_transposed, out->element_type() == ffi::BF16};
  const int64_t panels = (V + kColumns - 1) / kColumns;
  const int64_t parts = std::min<int64_t>(panels, threads.num_threads());
  share(threads, parts, [&](int64_t part) {
    multiply_panels(call, panels * part / parts, panels * (part + 1) / parts);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_matrix_product, matrix_product,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<ffi::AnyBuffer>()
        .Attr<bool>("is_transposed"));
