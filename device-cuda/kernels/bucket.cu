// Everything that is done to the bytes of a bucket, by one launch each: `encode` writes all weights of
// a bucket (or copies a bucket out into its tensors), `digest` sums it up.
//
// Work is cut into tiles of 16 or 32 KiB of source: one block of 128 x 128 elements, or so many bytes of
// a copy. A table has every job and the number of its first tile, so that eighteen thousand small matrices
// cost per byte what one large matrix does. A grid of a few blocks per multiprocessor walks the tiles.
//
// `common.cuh` and quant-fp8's `fp8.cuh` are in front of it.

// Blocks of a multiprocessor. More would fit, and are slower: each has a tile of its own open, and
// the memory serves few long runs faster than many.
#define BLOCKS 3
// What a block of threads has in shared memory of what it reads, where it reads ahead: a unit that it is at, and the next one.
#define UNITS 2
// As `Job` in src/table.rs.
struct Job {
    u64 source;         // device address of the first element
    u64 target;         // device address of the first code, or of the copy
    u64 scales;         // device address of the first scale
    u64 bytes;          // of the source
    u32 kind;           // 0 copy, 1 BF16, 2 F16, 3 F32
    u32 rows;           // of one matrix
    u32 cols;
    u32 block_rows;
    u32 block_cols;
    u32 bands;          // rows of blocks of one matrix
    u32 blocks;         // blocks of one band
    u32 flags;          // PRECAST, SUMMED, FROM, SCALES
};

// Round to BF16 first; add to the digest's sum what is written, which the sender of the table knows to be
// at a multiple of 8 bytes of the bucket. The bucket is what is written, or what a copy is FROM.
// SCALES are added as well, by the block that does the last tile of a matrix: they begin at a multiple of 64 bytes.
enum { PRECAST = 1, SUMMED = 2, FROM = 4, SCALES = 8 };
// Beside the types of elements.
enum { COPY = 0 };

// The bits of an element without its sign.
__device__ __forceinline__ u32 magnitude(const u8* source, u32 kind, u64 index) {
    if (kind == F32) return ((const u32*)source)[index] & 0x7fffffffu;
    return ((const u16*)source)[index] & 0x7fffu;
}

__device__ __forceinline__ float element(u64 source, u32 kind, bool precast, u64 index) {
    float value;
    if (kind == BF16) return bf16_value(((const u16*)source)[index]);
    if (kind == F16) {
        value = f16_value(((const u16*)source)[index]);
    } else {
        value = ((const float*)source)[index];
    }
    return precast ? round_to_bf16(value) : value;
}

// The products of the last bytes of a copy, less than 16; the last word is filled up with zeros.
__device__ __forceinline__ u64 tail_products(u64 index, const u8* source, u32 bytes) {
    u64 sum = 0;
    for (u32 at = threadIdx.x; at * 8 < bytes; at += THREADS) {
        u64 word = 0;
        for (u32 i = 0; i < 8 && at * 8 + i < bytes; i++) word |= (u64)source[at * 8 + i] << (8 * i);
        sum += product_at(index + at, word);
    }
    return sum;
}

// The products of scales that other blocks have written, as many as there are; the last word is filled up with zeros.
__device__ __noinline__ u64 scale_products(u64 scales, u32 count, u64 base) {
    const u32* values = (const u32*)scales;
    u64 index = (scales - base) >> 3, sum = 0;
    for (u32 at = threadIdx.x; 2 * at < count; at += THREADS) {
        u32 high = 2 * at + 1 < count ? __ldcg(values + 2 * at + 1) : 0;
        sum += product_at(index + at, (u64)high << 32 | __ldcg(values + 2 * at));
    }
    return sum;
}

// Whether this block has done the last of a job's tiles. `done` counts them, and is 0 again afterwards.
__device__ __forceinline__ bool is_last(u32* done, u32 tiles, u32* shared) {
    if (threadIdx.x == 0) {
        // The tile's scale is there before it is counted.
        __threadfence();
        u32 last = atomicAdd(done, 1) + 1 == tiles;
        if (last) *done = 0;
        *shared = last;
    }
    __syncthreads();
    bool last = *shared;
    if (last) __threadfence();
    return last;
}

// The largest of all threads' values. Two tiles in a row use different halves of `shared`, so that one
// barrier is enough.
__device__ __forceinline__ u32 block_max(u32 value, u32* shared) {
    value = __reduce_max_sync(0xffffffffu, value);
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    u32 result = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) result = max(result, shared[i]);
    return result;
}

// A block of a matrix: where its elements are, and where its codes go.
struct Block {
    const u8* source;
    u8* target;
    u64 source_row;     // bytes from one row to the next
    u64 target_row;
    u64 place;          // where the first code is in what the digest is of, in bytes
    float* scale;       // where the scale goes, if anywhere
    const u32* known;   // the block's largest magnitude, where others have a part of it
    u64 number;         // to report a block that has no finite form
    u32 rows;
    u32 cols;
    u32 flags;          // PRECAST, SUMMED
};

// Of a largest magnitude that is known: there is a NaN as well.
#define HAS_NAN 0x80000000u

// The scale of a block whose largest magnitude has these bits; reports a block that has none.
__device__ __forceinline__ Scale settle(u32 mode, u32 bits, const Block& block, u64* failed) {
    Scale scale = block_scale(mode, __uint_as_float(bits));
    bool finite = bits < 0x7f800000u && isfinite(scale.multiplier);
    if (threadIdx.x == 0) {
        if (block.scale) *block.scale = scale.scale;
        if (!finite) atomicMin(failed, block.number);
    }
    if (!finite) scale.multiplier = 0.0f;
    scale.bits = __float_as_uint(scale.scale);
    return scale;
}

// The bits of a largest magnitude as an F32.
__device__ __forceinline__ u32 widened(u32 kind, bool precast, u32 top) {
    if (top & HAS_NAN) return 0x7fffffffu;
    float value = kind == BF16 ? bf16_value(top) : kind == F16 ? f16_value(top) : __uint_as_float(top);
    // Rounding keeps the order, so the largest may be rounded alone.
    return __float_as_uint(precast ? round_to_bf16(value) : value);
}

// A block's products and its scale.
struct Encoded {
    u64 sum;
    Scale scale;
};

// A block of 128 x 128 whose rows begin at multiples of 16 bytes: read once, kept in registers.
// Thread t has columns 8 (t mod 16) .. + 8 of the rows t / 16 + 16 i.
template <int KIND>
__device__ __forceinline__ Encoded encode_block(u32 mode, const Block& block, u32* shared, u64* failed) {
    constexpr int STEPS = 8;
    constexpr int VECTORS = KIND == F32 ? 2 : 1;
    constexpr int SIZE = KIND == F32 ? 4 : 2;
    u32 rows = block.rows, cols = block.cols;
    bool precast = KIND != BF16 && (block.flags & PRECAST);
    u32 row = threadIdx.x >> 4, col = (threadIdx.x & 15) * 8;
    uint4 data[STEPS][VECTORS];
    const u8* source = block.source + row * block.source_row + col * SIZE;
    u64 stride = block.source_row * 16;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            bool inside = row + 16 * i < rows && col < cols;
            data[i][v] = inside ? load16(source + i * stride + 16 * v) : make_uint4(0, 0, 0, 0);
        }
    }
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            uint4 d = data[i][v];
            if (KIND == F32) {
                top = max(max(top, d.x & 0x7fffffffu), d.y & 0x7fffffffu);
                top = max(max(top, d.z & 0x7fffffffu), d.w & 0x7fffffffu);
            } else {
                u32 m = 0x7fff7fffu;
                top = __vmaxu2(__vmaxu2(top, d.x & m), __vmaxu2(d.y & m, __vmaxu2(d.z & m, d.w & m)));
            }
        }
    }
    if (KIND != F32) top = max(top & 0xffffu, top >> 16);
    top = block_max(top, shared);
    if (block.known) top = *block.known;
    Scale scale = settle(mode, widened(KIND, precast, top), block, failed);
    float m = scale.multiplier;
    u8* target = block.target + row * block.target_row + col;
    // Rows that are 16 apart have their words in the same lane.
    u64 word = (block.place + row * block.target_row + col) >> 3, sum = 0;
    u32 step = (u32)(block.target_row / 4);
    bool summed = block.flags & SUMMED;
    Keys keys = {0, 0, 0, 0};
    if (summed) keys = keys_of(word);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        u32 words[4 * VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            words[4 * v] = data[i][v].x, words[4 * v + 1] = data[i][v].y;
            words[4 * v + 2] = data[i][v].z, words[4 * v + 3] = data[i][v].w;
        }
        u32 pairs[4];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float a, b;
            if (KIND == BF16) {
                a = bf16_value(words[p] & 0xffffu), b = __uint_as_float(words[p] & 0xffff0000u);
            } else if (KIND == F16) {
                a = f16_value(words[p] & 0xffffu), b = f16_value(words[p] >> 16);
            } else {
                a = __uint_as_float(words[(2 * p) % (4 * VECTORS)]);
                b = __uint_as_float(words[(2 * p + 1) % (4 * VECTORS)]);
            }
            if (precast) a = round_to_bf16(a), b = round_to_bf16(b);
            pairs[p] = codes2(__fmul_rn(a, m), __fmul_rn(b, m));
        }
        if (row + 16 * i < rows && col < cols) {
            uint2 codes = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
            // Read next by another process, long after it has left the cache.
            __stcs((uint2*)(target + i * 16 * block.target_row), codes);
            if (summed) sum += product(keys, (u32)(word >> 3) + i * step, codes.x, codes.y);
        }
    }
    Encoded result = {sum, scale};
    return result;
}

// A block of any size at any alignment: read twice, the second time from a cache. A warp has a row at a
// time, and a thread the codes of a word of the digest. This is no inline function, so nothing is passed to it by address:
// what has an address is in memory, also for blocks that never come here.
__device__ __noinline__ Encoded encode_any(u32 mode, u32 kind, Block block, u32* shared, u64* failed) {
    bool precast = block.flags & PRECAST, summed = block.flags & SUMMED;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 top = 0;
    for (u32 row = warp; row < block.rows; row += THREADS / 32) {
        const u8* source = block.source + row * block.source_row;
#pragma unroll 4
        for (u32 col = lane; col < block.cols; col += 32) top = max(top, magnitude(source, kind, col));
    }
    top = block_max(top, shared);
    if (block.known) top = *block.known;
    Scale scale = settle(mode, widened(kind, precast, top), block, failed);
    Encoded result = {0, scale};
    for (u32 row = warp; row < block.rows; row += THREADS / 32) {
        u64 source = (u64)(block.source + row * block.source_row);
        u8* target = block.target + row * block.target_row;
        u64 place = block.place + row * block.target_row;
        u32 skip = (u32)place & 7;
        for (u32 at = lane * 8; at < skip + block.cols; at += 32 * 8) {
            u32 from = max(at, skip) - skip, to = min(at + 8, skip + block.cols) - skip;
            u64 word = 0;
            for (u32 col = from; col < to; col++) {
                float value = element(source, kind, precast, col);
                u32 code = codes2(__fmul_rn(value, scale.multiplier), 0.0f) & 0xff;
                word |= (u64)code << (8 * ((skip + col) & 7));
            }
            store_bytes(target + from, word >> (8 * ((skip + from) & 7)), to - from);
            if (summed) result.sum += product_at((place >> 3) + at / 8, word);
        }
    }
    return result;
}

__device__ __forceinline__ u64 copy(const Job* job, Tile tile, u64 base) {
    u64 start = (u64)tile.index * COPY_TILE;
    u32 bytes = (u32)min((u64)COPY_TILE, job->bytes - start);
    const u8* source = (const u8*)job->source + start;
    u8* target = (u8*)job->target + start;
    if ((((u64)source | (u64)target) & 15) == 0) {
        u32 vectors = bytes / 16;
        uint4 data[COPY_STEPS];
#pragma unroll
        for (int i = 0; i < COPY_STEPS; i++) {
            u32 at = threadIdx.x + i * THREADS;
            if (at < vectors) data[i] = load16(source + 16 * at);
        }
#pragma unroll
        for (int i = 0; i < COPY_STEPS; i++) {
            u32 at = threadIdx.x + i * THREADS;
            if (at < vectors) __stcs((uint4*)(target + 16 * at), data[i]);
        }
        for (u32 at = vectors * 16 + threadIdx.x; at < bytes; at += THREADS) target[at] = source[at];
        if (!(job->flags & SUMMED)) return 0;
        u64 place = job->flags & FROM ? (u64)source : (u64)target;
        u64 word = (place - base) >> 3, mine = word + 2 * threadIdx.x, sum = 0;
        Keys even = keys_of(mine), odd = keys_of(mine + 1);
#pragma unroll
        for (int i = 0; i < COPY_STEPS; i++) {
            // Steps are whole rows apart; a pair of words never is in two.
            u32 row = (u32)(mine >> 3) + i * (THREADS * 2 / 8);
            if (threadIdx.x + i * THREADS < vectors) {
                sum += product(even, row, data[i].x, data[i].y);
                sum += product(odd, row, data[i].z, data[i].w);
            }
        }
        u32 done = vectors * 16;
        return done == bytes ? sum : sum + tail_products(word + done / 8, source + done, bytes - done);
    } else if ((((u64)source | (u64)target) & 3) == 0) {
        u32 words = bytes / 4;
#pragma unroll 8
        for (u32 at = threadIdx.x; at < words; at += THREADS) {
            ((u32*)target)[at] = ((const u32*)source)[at];
        }
        for (u32 at = words * 4 + threadIdx.x; at < bytes; at += THREADS) target[at] = source[at];
    } else {
#pragma unroll 8
        for (u32 at = threadIdx.x; at < bytes; at += THREADS) target[at] = source[at];
    }
    return 0;
}

// The block of a matrix that a tile is, as the loop of `encode_tiles` finds it. The digest is of what begins at `base`.
__device__ __forceinline__ Block block_of(const Job* job, Tile tile, u64 base) {
    u32 blocks = job->blocks, bands = job->bands, width = job->cols;
    u32 band = tile.index / blocks, left = tile.index % blocks * job->block_cols;
    u32 matrix = band / bands, top = band % bands * job->block_rows;
    u64 first = ((u64)matrix * job->rows + top) * width + left;
    u32 size = job->kind == F32 ? 4 : 2;
    Block block;
    block.source = (const u8*)job->source + first * size;
    block.target = (u8*)job->target + first;
    block.source_row = (u64)width * size;
    block.target_row = width;
    block.place = job->target + first - base;
    block.scale = (float*)job->scales + tile.index;
    block.known = 0;
    block.number = (u64)tile.job << 32 | tile.index;
    block.rows = min(job->block_rows, job->rows - top);
    block.cols = min(job->block_cols, width - left);
    block.flags = job->flags;
    return block;
}

// The products of a matrix's scales, from the block that has done its last tile.
__device__ __forceinline__ u64 last_products(
    const Job* job, Tile tile, const u32* firsts, u32 count, u32 tiles, u64 base, u32* done, u32* last) {
    if (!(job->flags & SCALES)) return 0;
    u32 end = tile.job + 1 < count ? firsts[tile.job + 1] : tiles;
    u32 all = end - firsts[tile.job];
    // The next tile has a barrier before `last` is written again.
    return is_last(done + tile.job, all, last) ? scale_products(job->scales, all, base) : 0;
}

__device__ __forceinline__ void read16(void* stage, const u8* source) {
    u32 to = (u32)__cvta_generic_to_shared(stage);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(source) : "memory");
}

// What a block of threads reads at a time: a tile, or a half of one of F32. Units are read ahead, into places in shared memory that take
// turns. `Way` says where a unit's bytes go.
template <typename Way>
struct Reader {
    const Job* jobs;
    const u32* firsts;
    u32 count, tiles;
    u8* stage;
    u32 t, half, turn;

    __device__ __forceinline__ void read(u32 turn) {
        if (t < tiles) {
            Tile tile = find(firsts, count, t);
            Way::read(jobs + tile.job, tile, half, stage + turn * Way::UNIT);
        }
        asm volatile("cp.async.commit_group;");
    }

    __device__ __forceinline__ void begin() {
        t = blockIdx.x, half = 0, turn = UNITS - 1;
        read(0);
    }

    // Reads the unit after the present one, which was the last that was asked for, and waits for that.
    __device__ __forceinline__ const u8* next(bool is_halved) {
        half = is_halved && half == 0;
        if (!half) t += gridDim.x;
        read(turn);
        turn = (turn + 1) % UNITS;
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        return stage + turn * Way::UNIT;
    }
};

// Whether elements are rounded to BF16 before anything else.
enum { NEVER = 0, ALWAYS = 1 };

// Blocks of at most 128 x 128 whose rows begin anywhere. Their bytes come as they lie in memory, in vectors of 16 bytes.
struct Rows {
    // Of a row: the block's, which begins anywhere in the first 16 bytes.
    enum { PITCH_16 = 128 * 2 + 16, PITCH_F32 = 128 * 4 + 16, UNIT = 128 * PITCH_16 };

    // Whether all vectors are of the matrix: they reach up to 15 bytes beyond a row.
    __device__ static __forceinline__ bool is_inside(const Job* job, const Block& block) {
        u64 first = (u64)block.source & ~15ull, bytes = block.cols * (job->kind == F32 ? 4 : 2);
        u64 end = (u64)block.source + (block.rows - 1) * block.source_row + bytes + 15;
        return first >= job->source && end <= job->source + job->bytes;
    }

    __device__ static __forceinline__ void read(const Job* job, Tile tile, u32 half, u8* stage) {
        Block block = block_of(job, tile, 0);
        if (!is_inside(job, block)) return;
        if (job->kind == F32) vectors<4>(block, half, stage);
        else vectors<2>(block, 0, stage);
    }

    template <u32 SIZE>
    __device__ static __forceinline__ void vectors(const Block& block, u32 half, u8* stage) {
        constexpr u32 ACROSS = 128 * SIZE / 16, DOWN = THREADS / ACROSS, ROWS = 256 / SIZE;
        constexpr u32 PITCH = SIZE == 4 ? PITCH_F32 : PITCH_16;
        u64 stride = block.source_row;
        u32 begin = half * ROWS, rows = block.rows > begin ? min(block.rows - begin, ROWS) : 0;
        u64 source = (u64)block.source + begin * stride;
        u32 row = threadIdx.x / ACROSS, vector = threadIdx.x % ACROSS;
        u64 first = source + row * stride;
        // Rows that are 8 apart begin at the same place of a vector.
        bool needed = 16 * vector < ((u32)first & 15) + block.cols * SIZE;
        const u8* from = (const u8*)(first & ~15ull) + 16 * vector;
        u8* to = stage + row * PITCH + 16 * vector;
#pragma unroll
        for (u32 i = 0; i < ROWS / DOWN; i++) {
            if (needed && row + i * DOWN < rows) read16(to + i * DOWN * PITCH, from + i * DOWN * stride);
        }
        // The last vector of a row.
        if (threadIdx.x < rows) {
            first = source + threadIdx.x * stride;
            if (16 * ACROSS < ((u32)first & 15) + block.cols * SIZE) {
                read16(stage + threadIdx.x * PITCH + 16 * ACROSS, (const u8*)(first & ~15ull) + 16 * ACROSS);
            }
        }
    }

    // Zeros where a unit has no elements, and the elements of a block that is not inside.
    template <u32 SIZE>
    __device__ static __forceinline__ void complete(const Block& block, u32 half, bool inside, u8* stage) {
        constexpr u32 ROWS = 256 / SIZE, PITCH = SIZE == 4 ? PITCH_F32 : PITCH_16;
        u64 source = (u64)block.source + half * ROWS * block.source_row;
        for (u32 at = threadIdx.x; at < ROWS * 128; at += THREADS) {
            u32 row = at / 128, col = at % 128;
            u64 first = source + row * block.source_row;
            bool is_element = half * ROWS + row < block.rows && col < block.cols;
            if (is_element && inside) continue;
            u8* to = stage + row * PITCH + ((u32)first & 15) + SIZE * col;
            const u8* from = (const u8*)first + SIZE * col;
            if (SIZE == 4) *(u32*)to = is_element ? *(const u32*)from : 0;
            else *(u16*)to = is_element ? *(const u16*)from : 0;
        }
    }
};

// Lane l has the columns 4 l - skip .. + 4, modulo 128, of the rows t / 32 + 8 i: its codes are a word of memory, but for those of lane 0,
// of which some are the last ones of their row. Rows that are 8 apart begin at the same place within 8 bytes.
template <int KIND, int ROUNDED>
__device__ __forceinline__ void encode_rows(
    u32 mode, const Job* job, const Block& block, Reader<Rows>& reader, u32* shared, u64* failed) {
    constexpr u32 SIZE = KIND == F32 ? 4 : 2, HALVES = SIZE / 2, STEPS = 16 / HALVES;
    constexpr u32 PITCH = SIZE == 4 ? Rows::PITCH_F32 : Rows::PITCH_16;
    // Elements that are rounded first are kept rounded.
    constexpr bool IS_PAIR = KIND != F32 || ROUNDED == ALWAYS;
    constexpr u32 WORDS = IS_PAIR ? 2 : 4;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, cols = block.cols;
    u32 phase = (u32)((u64)block.source + warp * block.source_row) & 15;
    u8* target = block.target + warp * block.target_row;
    u32 skip = (u32)(u64)target & 3;
    bool inside = Rows::is_inside(job, block), whole = block.rows == 128 && cols == 128;
    u32 data[16][WORDS], places[4];
    // The codes that go to their place in the word, and those that go 128 places further.
    u32 near = 0, far = 0;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        u32 col = (4 * lane + j - skip) & 127;
        places[j] = warp * PITCH + phase + SIZE * col;
        if (col < cols) (4 * lane + j >= skip ? near : far) |= 1u << j;
    }
#pragma unroll
    for (u32 half = 0; half < HALVES; half++) {
        u8* stage = (u8*)reader.next(HALVES == 2);
        __syncthreads();
        if (!inside || !whole) {
            Rows::complete<SIZE>(block, half, inside, stage);
            __syncthreads();
        }
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) {
            u32 bits[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u8* from = stage + places[j] + 8 * i * PITCH;
                bits[j] = SIZE == 4 ? *(const u32*)from : *(const u16*)from;
            }
            u32* kept = data[half * STEPS + i];
            if (KIND == F32 && IS_PAIR) {
                kept[0] = rounded_pair(__uint_as_float(bits[0]), __uint_as_float(bits[1]));
                kept[1] = rounded_pair(__uint_as_float(bits[2]), __uint_as_float(bits[3]));
            } else if (IS_PAIR) {
                kept[0] = bits[0] | bits[1] << 16, kept[1] = bits[2] | bits[3] << 16;
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; j++) kept[j % WORDS] = bits[j];
            }
        }
        // The other half is read over what the last one had; after a tile, the block's maximum is waited for.
        if (half + 1 < HALVES) __syncthreads();
    }
    u32 top = 0;
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
#pragma unroll
        for (u32 w = 0; w < WORDS; w++) {
            top = IS_PAIR ? __vmaxu2(top, data[i][w] & 0x7fff7fffu) : max(top, data[i][w] & 0x7fffffffu);
        }
    }
    if (IS_PAIR) top = max(top & 0xffffu, top >> 16);
    top = block_max(top, shared);
    constexpr int KEPT = KIND == F32 && IS_PAIR ? BF16 : KIND;
    float m = settle(mode, widened(KEPT, ROUNDED == ALWAYS, top), block, failed).multiplier;
    u8* word = target + (int)(4 * lane - skip);
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        u32 pairs[2];
#pragma unroll
        for (u32 p = 0; p < 2; p++) {
            float a, b;
            u32 pair = data[i][p];
            if (KEPT == BF16) {
                a = bf16_value(pair & 0xffffu), b = __uint_as_float(pair & 0xffff0000u);
            } else if (KEPT == F16) {
                a = f16_value(pair & 0xffffu), b = f16_value(pair >> 16);
                if (ROUNDED == ALWAYS) {
                    pair = rounded_pair(a, b);
                    a = bf16_value(pair & 0xffffu), b = __uint_as_float(pair & 0xffff0000u);
                }
            } else {
                a = __uint_as_float(data[i][(2 * p) % WORDS]), b = __uint_as_float(data[i][(2 * p + 1) % WORDS]);
            }
            pairs[p] = codes2(__fmul_rn(a, m), __fmul_rn(b, m));
        }
        u32 codes = pairs[0] | pairs[1] << 16;
        if (warp + 8 * i >= block.rows) break;
        u8* at = word + 8 * i * block.target_row;
        if (near == 15) {
            *(u32*)at = codes;
            continue;
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (near >> j & 1) at[j] = (u8)(codes >> (8 * j));
            if (far >> j & 1) at[128 + j] = (u8)(codes >> (8 * j));
        }
    }
}

// `failed` is all ones, and gets the lowest job and block that has no finite form. `base` is where the
// bucket begins, for the digest, which is added to `total`. `done` has a zero for each job, and has it again afterwards.
template <bool WIDE>
__device__ __forceinline__ void encode_tiles(
    const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed, u64* total,
    u64 base, u32* done) {
    __shared__ u32 tops[2][THREADS / 32], last;
    u64 sum = 0;
    u32 parity = 0;
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const Job* job = jobs + tile.job;
        u32 kind = job->kind;
        if (kind == COPY) {
            sum += copy(job, tile, base);
            continue;
        }
        u32 blocks = job->blocks, bands = job->bands, width = job->cols;
        u32 block_rows = job->block_rows, block_cols = job->block_cols;
        u32 band = tile.index / blocks, block = tile.index % blocks;
        u32 matrix = band / bands, top = band % bands * block_rows;
        u32 left = block * block_cols;
        u64 first = ((u64)matrix * job->rows + top) * width + left;
        u32 size = kind == F32 ? 4 : 2;
        Block part;
        part.source = (const u8*)job->source + first * size;
        part.target = (u8*)job->target + first;
        part.source_row = (u64)width * size;
        part.target_row = width;
        part.place = job->target + first - base;
        part.scale = (float*)job->scales + tile.index;
        part.known = 0;
        part.number = (u64)tile.job << 32 | tile.index;
        part.rows = min(block_rows, job->rows - top);
        part.cols = min(block_cols, width - left);
        part.flags = job->flags;
        bool aligned = (width & 7) == 0 && ((job->source | job->target) & 15) == 0
            && block_rows <= 128 && block_cols <= 128;
        u32* shared = tops[parity];
        parity ^= 1;
        if (!aligned) {
            part.flags &= ~SUMMED;
            encode_any(mode, kind, part, shared, failed);
        } else if (kind == BF16) {
            sum += encode_block<BF16>(mode, part, shared, failed).sum;
        } else if (kind == F16) {
            sum += encode_block<F16>(mode, part, shared, failed).sum;
        } else if (WIDE) {
            sum += encode_block<F32>(mode, part, shared, failed).sum;
        }
        if (job->flags & SCALES) {
            u32 end = tile.job + 1 < count ? firsts[tile.job + 1] : tiles;
            u32 all = end - firsts[tile.job];
            // The next tile has a barrier before `last` is written again.
            if (is_last(done + tile.job, all, &last)) sum += scale_products(job->scales, all, base);
        }
    }
    add_to(total, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
encode(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed, u64* total,
       u64 base, u32* done) {
    encode_tiles<false>(jobs, firsts, count, tiles, mode, failed, total, base, done);
}

// Blocks of F32 take twice the registers: a launch that has one runs with half the threads in flight.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
encode_wide(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed,
            u64* total, u64 base, u32* done) {
    encode_tiles<true>(jobs, firsts, count, tiles, mode, failed, total, base, done);
}

// Blocks of at most 128 x 128 whose rows begin anywhere; those of F32 are rounded. Only scales are added to the digest.
// With three blocks, what a thread has would not fit into its registers.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
encode_odd(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed, u64* total,
           u64 base, u32* done) {
    extern __shared__ uint4 stage[];
    __shared__ u32 tops[2][THREADS / 32], last;
    Reader<Rows> reader = {jobs, firsts, count, tiles, (u8*)stage};
    reader.begin();
    u64 sum = 0;
    u32 parity = 0;
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const Job* job = jobs + tile.job;
        Block block = block_of(job, tile, base);
        u32* shared = tops[parity];
        parity ^= 1;
        bool precast = block.flags & PRECAST;
        if (job->kind == BF16) {
            encode_rows<BF16, NEVER>(mode, job, block, reader, shared, failed);
        } else if (job->kind == F16 && precast) {
            encode_rows<F16, ALWAYS>(mode, job, block, reader, shared, failed);
        } else if (job->kind == F16) {
            encode_rows<F16, NEVER>(mode, job, block, reader, shared, failed);
        } else {
            encode_rows<F32, ALWAYS>(mode, job, block, reader, shared, failed);
        }
        sum += last_products(job, tile, firsts, count, tiles, base, done, &last);
    }
    add_to(total, sum);
}

// A part of a bucket that carries weights: jobs are copies whose target is the offset in the bucket.
// Adds to `sum`.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
digest(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u64* sum) {
    u64 mine = 0;
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const Job* job = jobs + tile.job;
        u64 start = (u64)tile.index * COPY_TILE;
        u32 bytes = (u32)min((u64)COPY_TILE, job->bytes - start);
        const u8* source = (const u8*)job->source + start;
        u64 word = (job->target + start) >> 3, first = word + 2 * threadIdx.x;
        u32 vectors = bytes / 16;
        uint4 data[COPY_STEPS];
#pragma unroll
        for (int i = 0; i < COPY_STEPS; i++) {
            u32 at = threadIdx.x + i * THREADS;
            data[i] = at < vectors ? load16(source + 16 * at) : make_uint4(0, 0, 0, 0);
        }
        Keys even = keys_of(first), odd = keys_of(first + 1);
#pragma unroll
        for (int i = 0; i < COPY_STEPS; i++) {
            u32 row = (u32)(first >> 3) + i * (THREADS * 2 / 8);
            if (threadIdx.x + i * THREADS < vectors) {
                mine += product(even, row, data[i].x, data[i].y);
                mine += product(odd, row, data[i].z, data[i].w);
            }
        }
        u32 done = vectors * 16;
        if (done < bytes) mine += tail_products(word + done / 8, source + done, bytes - done);
    }
    add_to(sum, mine);
}
