// New keys and values into their slots of a paged pool on a CPU, called through jax.ffi.
//
//   pool   [P, K, S, 2H]  any dtype, keys in lanes 0..H-1, values behind them; it changes in place
//   k, v   [T, K, H]      of the pool's dtype
//   slots  [T]            block * S + offset of each token
//
// Bytes are moved, so no dtype is converted: XLA's scatter on a CPU makes a whole pool of 16 bits
// float32, and back again. Tokens of the null block are left out, as are those whose block the pool
// does not have.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace {
namespace ffi = xla::ffi;

ffi::Error write_kv(ffi::AnyBuffer before, ffi::AnyBuffer k, ffi::AnyBuffer v,
                    ffi::BufferR1<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> pool) {
  const auto blocks = before.dimensions(), tokens = k.dimensions();
  const int64_t P = blocks[0], K = blocks[1], S = blocks[2], T = tokens[0];
  const size_t row = tokens[2] * ffi::ByteWidth(k.element_type());
  char* to = static_cast<char*>(pool->untyped_data());
  const char* keys = static_cast<const char*>(k.untyped_data());
  const char* values = static_cast<const char*>(v.untyped_data());
  if (to != before.untyped_data()) std::memcpy(to, before.untyped_data(), before.size_bytes());
  for (int64_t t = 0; t < T; ++t) {
    const int64_t slot = slots.typed_data()[t];
    if (slot < S || slot >= P * S) continue;
    for (int64_t head = 0; head < K; ++head) {
      char* own = to + ((slot / S * K + head) * S + slot % S) * 2 * row;
      std::memcpy(own, keys + (t * K + head) * row, row);
      std::memcpy(own + row, values + (t * K + head) * row, row);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_write_kv, write_kv,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::BufferR1<ffi::S32>>().Ret<ffi::AnyBuffer>());
