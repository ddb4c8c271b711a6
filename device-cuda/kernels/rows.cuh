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
