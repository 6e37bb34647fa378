"""New K and V into their slots on a TPU: the pool changes in place, a group of slots at a time.

A copy to or from the pool moves whole tiles of it, so that GROUP slots are the least that can move.
A group is fetched, new rows replace some of its slots, and it is stored; a group that is all new is
not fetched. Many groups are on their way at once, in a ring of buffers: half come, half go.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int32, Real

from pallas_kernels.tpu.device import LANES, SUBLANES, check_pool, simulator, whole_lanes

GROUP = SUBLANES  # slots
MAX_BUFFERS = 32  # the latency of a copy over the work on an item, twice, and some more
RING_BYTES = 2 << 20  # more on their way than memory has open at once
TILE_BYTES = 3 << 20  # two tiles of new rows and the ring fit the 16 MiB of a v5e program
MAX_TILE_TOKENS = 512  # each token of a tile is compared with each other
MAX_CALL_TOKENS = 2048  # XLA makes words of a call's rows, up to three copies of them
WORD_BITS = 32  # groups are merged as words: only these are loaded from any row on
DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn", "float8_e5m2")
# What is known of an item, at its first token.
BLOCK, ROW, FIRST_WORD, LOW, HIGH, NEXT, WAITS = range(7)
NUM_FIELDS = 7


def write_kv(
    pool: Real[Array, "P K S W"],
    kv: Real[Array, "T K W"],
    slots: Int32[Array, " T"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Real[Array, "P K S W"]:
    """The pool with each token's row in slot `block * S + offset`, in place if donated.

    Rows are of the pool's dtype. Tokens of the null block are left out, as are those whose
    block the pool does not have. Any order is right, and of equal slots the last token stays; what
    is fast is an order in which tokens of one group of slots are neighbours. With `interpret` a
    TPU is simulated on whatever device there is, as `InterpretParams` say.
    """
    check_pool(pool.shape[2], pool.dtype, DTYPES)
    interpret = simulator(interpret)
    for start in range(0, slots.shape[0], MAX_CALL_TOKENS):
        part = slice(start, start + MAX_CALL_TOKENS)
        new = kv[part], slots[part]
        if start:  # a part's words are not made before the part before is written
            pool, *new = jax.lax.optimization_barrier((pool, *new))
        pool = _write_part(pool, *new, interpret=interpret)
    return pool


def _write_part(
    pool: Real[Array, "P K S W"],
    kv: Real[Array, "T K W"],
    slots: Int32[Array, " T"],
    *,
    interpret: bool | pltpu.InterpretParams,
) -> Real[Array, "P K S W"]:
    """The same with as many tokens as one call takes."""
    _, K, _, W = pool.shape
    tokens = _tile_tokens(slots.shape[0], K * whole_lanes(W) * WORD_BITS // 8)
    slots = jnp.pad(slots, (0, -slots.shape[0] % tokens))  # slot 0 is the null block's
    starts, items = _list_items(slots.reshape(-1, tokens), pool)
    return _write_call(starts, items, _words(kv, tokens), pool, interpret=interpret)


def _tile_tokens(num_tokens: int, token_bytes: int) -> int:
    """Tokens of a tile: tiles that fit, all of one size, with as few padding tokens as can be."""
    fit = (TILE_BYTES // token_bytes - 2 * GROUP) // GROUP * GROUP  # `_words` pads both ends
    fit = max(GROUP, min(fit, MAX_TILE_TOKENS))
    num_tiles = pl.cdiv(num_tokens, fit)
    return pl.cdiv(pl.cdiv(num_tokens, num_tiles), GROUP) * GROUP


def _list_items(
    slots: Int32[Array, "X T"], pool: Real[Array, "P K S W"]
) -> tuple[Int32[Array, "X 2"], Int32[Array, "X 1 fields"]]:
    """An item is a run of a tile's tokens within one group; a list linked by first tokens.

    Gives each tile's first item and how many it has, and the fields of items, each field's T
    tokens after those of the field before. All layers of a step have the same list: XLA makes it
    once.
    """
    P, _, S, _ = pool.shape
    T = slots.shape[1]
    tokens = jnp.arange(T, dtype=jnp.int32)
    tokens_XT = tokens[None, :]
    later_TU = tokens[:, None] < tokens[None, :]
    live_XT = (slots >= S) & (slots < P * S)
    before_XT = jnp.pad(slots[:, :-1], [(0, 0), (1, 0)])
    joins_XT = live_XT & (slots == before_XT + 1) & (slots % GROUP != 0) & (tokens_XT > 0)
    starts_XT = live_XT & ~joins_XT

    def next_of(flags: Bool[Array, "X T"]) -> Int32[Array, "X T"]:
        return jnp.where(later_TU[None] & flags[:, None, :], tokens[None, None, :], T).min(axis=2)

    low_XT, next_XT = slots % GROUP, next_of(starts_XT)
    fields = {
        BLOCK: slots // S,
        ROW: slots % S - low_XT,
        FIRST_WORD: tokens_XT - low_XT + GROUP,
        LOW: low_XT,
        HIGH: low_XT + next_of(~joins_XT) - tokens_XT,
        NEXT: next_XT,
        WAITS: _named_before(slots // GROUP, starts_XT).astype(jnp.int32),
    }
    items = jnp.concatenate([fields[name] for name in range(NUM_FIELDS)], axis=1)
    first_X = jnp.where(starts_XT[:, 0], 0, next_XT[:, 0])
    return jnp.stack([first_X, starts_XT.sum(axis=1, dtype=jnp.int32)], axis=1), items[:, None, :]


def _named_before(groups: Int32[Array, "X T"], starts: Bool[Array, "X T"]) -> Bool[Array, "X T"]:
    """Whether an earlier item of the tile has the group: that one must have been stored first."""
    tokens = jnp.arange(groups.shape[1])
    earlier_TU = tokens[None, :] < tokens[:, None]
    same_XTU = groups[:, :, None] == groups[:, None, :]
    return (same_XTU & starts[:, None, :] & earlier_TU[None]).any(axis=2)


def _words(kv: Real[Array, "T K W"], tokens: int) -> Int32[Array, "X K Y U 128"]:
    """Each value's bits in a word of its own, by tiles of tokens, heads and registers of lanes.

    A run's group may begin before its tile does and end after: rows are added at both ends.
    """
    T, K, W = kv.shape
    bits_TKW = jax.lax.bitcast_convert_type(kv, f"uint{8 * kv.dtype.itemsize}")
    words_TKW = jax.lax.bitcast_convert_type(bits_TKW.astype(jnp.uint32), jnp.int32)
    words_TKW = jnp.pad(words_TKW, [(0, -T % tokens), (0, 0), (0, -W % LANES)])
    words_XUKYL = words_TKW.reshape(-1, tokens, K, pl.cdiv(W, LANES), LANES)
    words_XUKYL = jnp.pad(words_XUKYL, [(0, 0), (GROUP, GROUP), (0, 0), (0, 0), (0, 0)])
    return jnp.moveaxis(words_XUKYL, 1, 3)


def _write_call(
    starts: Int32[Array, "X 2"],
    items: Int32[Array, "X 1 fields"],
    words: Int32[Array, "X K Y U 128"],
    pool: Real[Array, "P K S W"],
    *,
    interpret: bool | pltpu.InterpretParams,
) -> Real[Array, "P K S W"]:
    """The kernel over a grid of tiles, one after the other; the pool stays where it is."""
    _, K, _, W = pool.shape
    X, _, num_fields = items.shape
    group_bytes = K * GROUP * W * pool.dtype.itemsize
    num_buffers = max(2, min(MAX_BUFFERS, RING_BYTES // group_bytes))
    return pl.pallas_call(
        _write_kernel,
        name="write_kv",
        grid=(X,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, 1, num_fields), lambda tile: (tile, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((None, *words.shape[1:]), lambda tile: (tile, 0, 0, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={3: 0},
        scratch_shapes=[
            pltpu.VMEM((num_buffers, K, GROUP, W), pool.dtype),
            pltpu.SMEM((num_buffers,), jnp.int32),
            pltpu.SemaphoreType.DMA((num_buffers,)),
            pltpu.SemaphoreType.DMA((num_buffers,)),
        ],
        # Items are of blocks that the pool has, and the checks are a third of an item's time.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), disable_bounds_checks=True
        ),
        interpret=interpret,
    )(starts, items, words, pool)


def _write_kernel(
    starts_ref,  # i32[X, 2] in SMEM: a tile's first item, and how many it has
    items_ref,  # i32[1, 7 * T] in SMEM
    words_ref,  # i32[K, Y, U, 128], U = GROUP + T + GROUP
    _,  # the pool before, which is `pool_ref`
    pool_ref,  # [P, K, S, W] in HBM
    ring_ref,  # [buffers, K, GROUP, W], scratch: groups that come and go
    token_ref,  # i32[buffers] in SMEM, scratch: the first token of a buffer's item
    fetched_ref,  # semaphores [buffers]
    stored_ref,  # semaphores [buffers]
):
    """One tile's items in order, each fetched some items ahead; all are stored at the end."""
    (num_buffers,) = token_ref.shape
    T = items_ref.shape[1] // NUM_FIELDS
    ahead = num_buffers // 2
    token, num_items = (starts_ref[pl.program_id(0), field] for field in range(2))

    def field(name, token):
        return items_ref[0, name * T + token]

    def group_of(token):
        row = pl.multiple_of(field(ROW, token), GROUP)
        return pool_ref.at[field(BLOCK, token), :, pl.ds(row, GROUP), :]

    def fetch(token, buffer):
        return pltpu.make_async_copy(group_of(token), ring_ref.at[buffer], fetched_ref.at[buffer])

    def wait_stored(item, _):
        group = ring_ref.at[item % num_buffers]  # for its size: a wait asks no more of a copy
        _wait(pltpu.make_async_copy(group, group, stored_ref.at[item % num_buffers]))

    def keeps_slots(token):
        return field(HIGH, token) - field(LOW, token) < GROUP

    def begin(item, state):
        """Fetches the item, if it can be now; gives the next one's token."""
        token, num_stored = state
        buffer = item % num_buffers

        @pl.when(num_stored + num_buffers <= item)
        def _free_buffer():
            wait_stored(item - num_buffers, None)

        token_ref[buffer] = token

        @pl.when(keeps_slots(token) & (field(WAITS, token) == 0))
        def _fetch():
            fetch(token, buffer).start()

        return field(NEXT, token), jnp.maximum(num_stored, item - num_buffers + 1)

    def finish(item, state):
        """Merges the item with its new rows and stores it, and begins the one that is ahead."""
        state = jax.lax.cond(
            item + ahead < num_items, lambda: begin(item + ahead, state), lambda: state
        )
        next_token, num_stored = state
        buffer = item % num_buffers
        token = token_ref[buffer]
        keeps, waits = keeps_slots(token), field(WAITS, token) == 1

        @pl.when(waits)
        def _fetch_late():
            jax.lax.fori_loop(num_stored, item, wait_stored, None)

            @pl.when(keeps)
            def _fetch():
                fetch(token, buffer).start()

        @pl.when(keeps)
        def _wait_fetched():
            _wait(fetch(token, buffer))

        first, low, high = (field(name, token) for name in (FIRST_WORD, LOW, HIGH))
        _merge(ring_ref.at[buffer], words_ref, first, low, high)
        group = ring_ref.at[buffer]
        pltpu.make_async_copy(group, group_of(token), stored_ref.at[buffer]).start()
        return next_token, jnp.where(waits, jnp.maximum(num_stored, item), num_stored)

    state = jax.lax.fori_loop(0, jnp.minimum(ahead, num_items), begin, (token, jnp.int32(0)))
    _, num_stored = jax.lax.fori_loop(0, num_items, finish, state)
    jax.lax.fori_loop(num_stored, num_items, wait_stored, None)


def _wait(copy):
    copy.wait()


def _merge(
    group_ref,  # [K, GROUP, W]
    words_ref,  # i32[K, Y, U, 128]
    first,  # row of `words_ref` that goes to the group's row 0, were it new
    low,  # rows low..high-1 of the group are new
    high,
):
    """Puts new rows among a group's others, as words that hold a few rows' values each."""
    K, _, W = group_ref.shape
    packing = WORD_BITS // 8 // group_ref.dtype.itemsize
    bits, num_words = WORD_BITS // packing, GROUP // packing
    row = jax.lax.broadcasted_iota(jnp.int32, (num_words, LANES), 0) * packing
    new, every_bit = jnp.zeros_like(row), jnp.uint32((1 << bits) - 1).astype(jnp.int32)
    for part in range(packing):
        is_new = (row + part >= low) & (row + part < high)
        new |= jnp.where(is_new, every_bit, 0) << (bits * part)
    for head in range(K):
        for register in range(words_ref.shape[1]):
            start = register * LANES
            width = min(LANES, W - start)
            words = jnp.zeros_like(row)
            for part in range(packing):
                rows = pl.ds(first + part, num_words, stride=packing)
                words |= words_ref[head, register, rows, :] << (bits * part)
            old = pltpu.bitcast(group_ref[head, :, start : start + width], jnp.int32)
            merged = (words & new)[:, :width] | (old & ~new[:, :width])
            group_ref[head, :, start : start + width] = pltpu.bitcast(merged, group_ref.dtype)
