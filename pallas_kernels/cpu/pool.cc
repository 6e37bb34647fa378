// What changes a paged pool in place on a CPU, called through jax.ffi.
//
//   pool    [P, K, S, 2H]     any dtype, keys in lanes 0..H-1, values behind them
//   k, v    [T, K, H]         of the pool's dtype: new keys and values,
//   slots   [T]               and where they go: block * S + offset of each token
//   copies  [X, 2]            of whole blocks, (source, destination), of which
//   count   []                so many are done, in order
//   ids     [X]               the blocks that become
//   blocks  [X, L, K, S, 2H]  those of `layer`
//
// Bytes are moved, so no dtype is converted: where XLA scatters or copies 16 bits on a CPU (JAX
// 0.10), it makes the whole pool float32 and back again. What would lie outside the pool is left
// out, and new keys and values for the null block are, too.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace {
namespace ffi = xla::ffi;

// The pool's bytes, those from before in them: XLA hands out the same ones if it may.
char* same(ffi::AnyBuffer before, ffi::Result<ffi::AnyBuffer>& pool) {
  char* to = static_cast<char*>(pool->untyped_data());
  if (to != before.untyped_data()) std::memcpy(to, before.untyped_data(), before.size_bytes());
  return to;
}

ffi::Error write_kv(ffi::AnyBuffer before, ffi::AnyBuffer k, ffi::AnyBuffer v,
                    ffi::BufferR1<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> pool) {
  const auto blocks = before.dimensions(), tokens = k.dimensions();
  const int64_t P = blocks[0], K = blocks[1], S = blocks[2], T = tokens[0];
  const size_t row = tokens[2] * ffi::ByteWidth(k.element_type());
  const char* keys = static_cast<const char*>(k.untyped_data());
  const char* values = static_cast<const char*>(v.untyped_data());
  char* to = same(before, pool);
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

ffi::Error copy_blocks(ffi::AnyBuffer before, ffi::BufferR2<ffi::S32> copies,
                       ffi::BufferR0<ffi::S32> count, ffi::Result<ffi::AnyBuffer> pool) {
  const int64_t P = before.dimensions()[0], size = before.size_bytes() / P;
  const int64_t num = std::min<int64_t>(count.typed_data()[0], copies.dimensions()[0]);
  char* to = same(before, pool);
  for (int64_t i = 0; i < num; ++i) {
    const int64_t from = copies.typed_data()[2 * i], own = copies.typed_data()[2 * i + 1];
    if (std::min(from, own) < 0 || std::max(from, own) >= P) continue;
    std::memmove(to + own * size, to + from * size, size);
  }
  return ffi::Error::Success();
}

ffi::Error write_blocks(ffi::AnyBuffer before, ffi::BufferR1<ffi::S32> ids, ffi::AnyBuffer blocks,
                        ffi::Result<ffi::AnyBuffer> pool, int64_t layer) {
  const int64_t P = before.dimensions()[0], size = before.size_bytes() / P;
  const int64_t L = blocks.dimensions()[1];
  const char* from = static_cast<const char*>(blocks.untyped_data());
  char* to = same(before, pool);
  for (int64_t i = 0; i < ids.dimensions()[0]; ++i)
    if (const int64_t own = ids.typed_data()[i]; own >= 0 && own < P)
      std::memcpy(to + own * size, from + (i * L + layer) * size, size);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_write_kv, write_kv,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::BufferR1<ffi::S32>>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_copy_blocks, copy_blocks,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::BufferR2<ffi::S32>>()
        .Arg<ffi::BufferR0<ffi::S32>>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jpaged_write_blocks, write_blocks,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::BufferR1<ffi::S32>>().Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>().Attr<int64_t>("layer"));
