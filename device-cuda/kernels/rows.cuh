// Rows of bytes that are copied, digested, or both.

// Add to the digest's sum what is written. Rows begin at multiples of 16 bytes; rows of 64 bytes stay in one lane of the digest.
enum { SUMMED = 2, FAST = 16, KEYED = 32 };

// The last bytes of rows, behind those that fill 16: copied if WRITE, digested in any case if they are SUMMED.
template <bool WRITE>
__device__ __noinline__ u64 pass_ends(
    const u8* source, u64 source_row, u8* target, u64 target_row, u64 place, u32 rows, u32 bytes, u32 flags) {
    u64 sum = 0;
    u32 done = bytes & ~15u, left = bytes - done;
    for (u32 n = threadIdx.x; n < rows * 2; n += THREADS) {
        u32 row = n / 2, from = n % 2 * 8;
        if (from >= left) continue;
        u64 at = row * target_row + done + from, word = 0;
        u32 count = min(left - from, 8u);
        for (u32 i = 0; i < count; i++) word |= (u64)source[row * source_row + done + from + i] << (8 * i);
        if (WRITE) store_bytes(target + at, word, count);
        if (flags & SUMMED) sum += product_at((place + at) >> 3, word);
    }
    return sum;
}

// Rows that begin anywhere: a thread has the bytes of a word of the digest.
template <bool WRITE>
__device__ __noinline__ u64 pass_any(
    const u8* source, u64 source_row, u8* target, u64 target_row, u64 place, u32 rows, u32 bytes, u32 flags) {
    u64 sum = 0;
    u32 most = (bytes + 14) / 8;
    for (u32 n = threadIdx.x; n < rows * most; n += THREADS) {
        u32 row = n / most, at = n % most * 8;
        u64 first = place + row * target_row;
        u32 skip = (u32)first & 7;
        if (at >= skip + bytes) continue;
        u32 from = max(at, skip) - skip, to = min(at + 8, skip + bytes) - skip;
        u64 word = 0;
        for (u32 i = from; i < to; i++) word |= (u64)source[row * source_row + i] << (8 * (i - from));
        if (WRITE) store_bytes(target + row * target_row + from, word, to - from);
        if (flags & SUMMED) sum += product_at((first >> 3) + at / 8, word << (8 * ((skip + from) & 7)));
    }
    return sum;
}

// The vectors of FAST rows, in memory, or in shared memory if STAGED.
template <bool WRITE, bool STAGED>
__device__ __forceinline__ u64 pass_vectors(
    const u8* source, u64 source_row, u8* target, u64 target_row, u64 place, u32 rows, u32 bytes, u32 flags) {
    u64 sum = 0;
    bool summed = flags & SUMMED, keyed = rows == 1 || (flags & KEYED);
    u32 vectors = bytes / 16, all = rows * vectors;
    for (u32 start = 0; start < all; start += COPY_STEPS * THREADS) {
        uint4 data[COPY_STEPS];
#pragma unroll
        for (int i = 0; i < COPY_STEPS; i++) {
            u32 n = start + threadIdx.x + i * THREADS, row = rows == 1 ? 0 : n / vectors, at = (n - row * vectors) * 16;
            const u8* from = source + row * source_row + at;
            if (n < all) data[i] = STAGED ? *(const uint4*)from : load16(from);
        }
        Keys even, odd;
#pragma unroll
        for (int i = 0; i < COPY_STEPS; i++) {
            u32 n = start + threadIdx.x + i * THREADS, row = rows == 1 ? 0 : n / vectors, at = (n - row * vectors) * 16;
            if (n >= all) break;
            u64 to = row * target_row + at, word = (place + to) >> 3;
            if (WRITE) __stcs((uint4*)(target + to), data[i]);
            if (!summed) continue;
            if (i == 0 || !keyed) even = keys_of(word), odd = keys_of(word + 1);
            sum += product(even, (u32)(word >> 3), data[i].x, data[i].y);
            sum += product(odd, (u32)(word >> 3), data[i].z, data[i].w);
        }
    }
    return sum;
}

// Rows of bytes: copied if WRITE, digested in any case if they are SUMMED.
template <bool WRITE>
__device__ __forceinline__ u64 pass_rows(
    const u8* source, u64 source_row, u8* target, u64 target_row, u64 place, u32 rows, u32 bytes, u32 flags) {
    if (!(flags & FAST)) return pass_any<WRITE>(source, source_row, target, target_row, place, rows, bytes, flags);
    u64 sum = pass_vectors<WRITE, false>(source, source_row, target, target_row, place, rows, bytes, flags);
    return bytes & 15 ? sum + pass_ends<WRITE>(source, source_row, target, target_row, place, rows, bytes, flags) : sum;
}

// Sums of tiles, added to the sum of their slot when the next one is another's.
struct Sums {
    u64* all;
    u64 mine;
    u32 slot;
};

__device__ __forceinline__ void take_slot(Sums* sums, u32 slot) {
    if (slot == sums->slot) return;
    if (sums->slot != ~0u) add_to(sums->all + sums->slot, sums->mine);
    sums->mine = 0;
    sums->slot = slot;
}

#if __CUDA_ARCH__ >= 900
// From compute capability 9.0 on, the bulk engine copies rows to shared memory and from there to where they go, without a register. Threads
// only digest what is in between.

// As in src/kernels.rs: the bytes of a stage, which has a tile, and the number of stages.
#define STAGE (16 << 10)
#define STAGES 4
// Rows of fewer bytes are not worth the bulk engine's time for one.
#define BULK_ROW 1024

// Rows of bytes, and where they go.
struct Rows {
    const u8* source;
    u8* target;
    u64 source_row, target_row;
    u64 place;          // where the target is in what the digest is of
    u32 rows, bytes;
    u32 flags;
    u32 slot;           // the sum that they add to
};

__device__ __forceinline__ bool is_bulk(const Rows& r) {
    return (r.flags & FAST) && r.bytes >= BULK_ROW && r.rows * (r.bytes & ~15u) <= STAGE;
}

__device__ __forceinline__ u32 shared_address(const void* memory) { return (u32)__cvta_generic_to_shared(memory); }

// Of the first warp: reads all vectors of rows into a stage.
__device__ __forceinline__ void bulk_read(const Rows& r, u8* stage, u64* full) {
    u32 lane = threadIdx.x & 31, bytes = r.bytes & ~15u, barrier = shared_address(full);
    if (lane == 0) {
        asm volatile("{ .reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1; }"
                     :: "r"(barrier), "r"(r.rows * bytes) : "memory");
    }
    for (u32 row = lane; row < r.rows; row += 32) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     :: "r"(shared_address(stage) + row * bytes), "l"(r.source + row * r.source_row), "r"(bytes), "r"(barrier)
                     : "memory");
    }
}

// Of the first warp: writes all vectors of rows from a stage.
__device__ __forceinline__ void bulk_write(const Rows& r, const u8* stage) {
    u32 bytes = r.bytes & ~15u;
    for (u32 row = threadIdx.x & 31; row < r.rows; row += 32) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                     :: "l"(r.target + row * r.target_row), "r"(shared_address(stage) + row * bytes), "r"(bytes) : "memory");
    }
}

__device__ __forceinline__ void wait_for(u64* full, u32 parity) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(shared_address(full)), "r"(parity) : "memory");
    } while (!done);
}

// Copies the tiles of a table, which has `tiles`, at most RUN in a row, `rows(walk)`, which says what a tile is, and the `sums` of its slots.
template <typename Table>
__device__ __forceinline__ void copy_tiles(const Table& table) {
    extern __shared__ __align__(128) u8 stages[];
    __shared__ u64 full[STAGES];
    bool reads = threadIdx.x < 32;
    if (threadIdx.x < STAGES) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(shared_address(full + threadIdx.x)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    Sums sums = {table.sums, 0, ~0u};
    // `ahead` is a tile that is read while others are written; it goes to the stage `next`.
    Walk w = walk_of(table.tiles, Table::RUN), ahead = w;
    for (u32 next = 0; reads && next + 1 < STAGES && ahead.tile < table.tiles; next++, go_on(&ahead)) {
        Rows r = table.rows(&ahead);
        if (is_bulk(r)) bulk_read(r, stages + next * STAGE, full + next);
    }
    u32 parities = 0;
    for (u32 at = 0; w.tile < table.tiles; at = (at + 1) % STAGES, go_on(&w)) {
        Rows r = table.rows(&w);
        take_slot(&sums, r.slot);
        u8* stage = stages + at * STAGE;
        u32 bytes = r.bytes & ~15u;
        if (is_bulk(r)) {
            wait_for(full + at, parities >> at & 1);
            parities ^= 1u << at;
            if (reads) bulk_write(r, stage);
            if (r.flags & SUMMED) {
                sums.mine += pass_vectors<false, true>(stage, bytes, 0, r.target_row, r.place, r.rows, r.bytes, r.flags);
            }
            if (bytes != r.bytes) {
                sums.mine += pass_ends<true>(r.source, r.source_row, r.target, r.target_row, r.place, r.rows, r.bytes, r.flags);
            }
        } else {
            sums.mine += pass_rows<true>(r.source, r.source_row, r.target, r.target_row, r.place, r.rows, r.bytes, r.flags);
        }
        if (reads) {
            // The stage before this one is free when it has been written from, which was asked for one tile ago.
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        }
        // And when all threads have digested it, which they have if they are here.
        __syncthreads();
        if (reads && ahead.tile < table.tiles) {
            u32 next = (at + STAGES - 1) % STAGES;
            Rows r = table.rows(&ahead);
            if (is_bulk(r)) bulk_read(r, stages + next * STAGE, full + next);
            go_on(&ahead);
        }
    }
    take_slot(&sums, ~0u);
    if (reads) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
#endif
