// Everything that is done to the bytes of a bucket, by one launch each: `encode` writes all weights of
// a bucket (or copies a bucket out into its tensors), `digest` sums it up.
//
// Work is cut into tiles of 16 or 32 KiB of source: one block of 128 x 128 elements, or so many bytes of
// a copy. A table has every job and the number of its first tile, so that eighteen thousand small matrices
// cost per byte what one large matrix does. A grid of a few blocks per multiprocessor walks the tiles.
//
// `common.cuh`, quant-fp8's `fp8.cuh` and `rows.cuh` are in front of it.

// Blocks of a multiprocessor. More would fit, and are slower: each has a tile of its own open, and
// the memory serves few long runs faster than many.
#define BLOCKS 3
// What a block of threads has in shared memory of what it reads, where it reads ahead: a unit that it is at, and the next one.
#define UNITS 2
// Blocks of `encode_odd` on a multiprocessor.
#define ODD_BLOCKS 2
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
// SCALES are added as well, by `sum_scales`: they begin at a multiple of 64 bytes.
enum { PRECAST = 1, FROM = 4, SCALES = 8 };
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

// What the codes of blocks are compared with: a copy of an earlier version of the bucket. `marks` has a bit for each 8 bytes of the bucket,
// which is 0 where they are equal. Only the others are written.
struct Against {
    const u8* old;      // device address of what the copy has in the place of the block's first code
    u8* marks;          // device address of the marks of the block's first row
};

// A block of 128 x 128 whose rows begin at multiples of 16 bytes: read once, kept in registers.
// Thread t has columns 8 (t mod 16) .. + 8 of the rows t / 16 + 16 i.
// What is compared is not digested; its rows are whole, and begin at multiples of 128 bytes of the bucket.
template <int KIND, bool COMPARED = false>
__device__ __forceinline__ Encoded encode_block(u32 mode, const Block& block, u32* shared, u64* failed, Against against = {}) {
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
    // The first are asked for before all threads wait for one another. There are not enough registers for all.
    constexpr int AHEAD = 3;
    uint2 old[AHEAD];
    const u8* earlier = against.old + row * block.target_row + col;
    if (COMPARED) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            old[i] = row + 16 * i < rows ? load8(earlier + i * 16 * block.target_row) : make_uint2(0, 0);
        }
    }
    top = block_max(top, shared);
    if (block.known) top = *block.known;
    Scale scale = settle(mode, widened(KIND, precast, top), block, failed);
    float m = scale.multiplier;
    u8* target = block.target + row * block.target_row + col;
    // Rows that are 16 apart have their words in the same lane.
    u64 word = (block.place + row * block.target_row + col) >> 3, sum = 0;
    u32 step = (u32)(block.target_row / 4);
    bool summed = !COMPARED && block.flags & SUMMED;
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
            if (precast) {
                u32 pair = rounded_pair(a, b);
                a = bf16_value(pair & 0xffffu), b = __uint_as_float(pair & 0xffff0000u);
            }
            pairs[p] = codes2(__fmul_rn(a, m), __fmul_rn(b, m));
        }
        uint2 codes = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
        if (COMPARED) {
            bool inside = row + 16 * i < rows;
            bool differs = inside && (codes.x != old[i % AHEAD].x || codes.y != old[i % AHEAD].y);
            if (i + AHEAD < STEPS && row + 16 * (i + AHEAD) < rows) {
                old[i % AHEAD] = load8(earlier + (i + AHEAD) * 16 * block.target_row);
            }
            if (differs) *(uint2*)(target + i * 16 * block.target_row) = codes;
            // A warp has two rows, and a row of a block 16 marks.
            u32 marks = __ballot_sync(0xffffffffu, differs) >> (threadIdx.x & 16);
            if (col == 0 && inside) *(u16*)(against.marks + (row + 16 * i) * (block.target_row / 64)) = (u16)marks;
        } else if (row + 16 * i < rows && col < cols) {
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

// The block of a matrix that a tile is. The digest is of what begins at `base`.
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
    Walk walk;
    u32 half, turn;

    __device__ __forceinline__ void read(u32 turn) {
        if (walk.tile < tiles) {
            Tile tile = tile_of(&walk, firsts, count, tiles);
            Way::read(jobs + tile.job, tile, half, stage + turn * Way::UNIT);
        }
        asm volatile("cp.async.commit_group;");
    }

    __device__ __forceinline__ void begin() {
        half = 0, turn = UNITS - 1;
        read(0);
    }

    // Reads the unit after the present one, which was the last that was asked for, and waits for that.
    __device__ __forceinline__ const u8* next(bool is_halved) {
        half = is_halved && half == 0;
        if (!half) go_on(&walk);
        read(turn);
        turn = (turn + 1) % UNITS;
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        return stage + turn * Way::UNIT;
    }
};

// Whether elements are rounded to BF16 before anything else.
enum { NEVER = 0, ALWAYS = 1 };

// Blocks of at most 128 x 128 whose rows begin anywhere. Their bytes come as they lie in memory, in vectors of 16 bytes.
struct OddRows {
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

// The codes of a row that are not written yet, as words: those of the sector in front of it, and those of its last word.
#define KEPT_WORDS 9

// Writes the codes of words that have others' bytes as well, and those that wait for a block that does not come.
__device__ __forceinline__ void write_ends(const Block& block, const u32* kept, bool follows, bool goes_on) {
    u32 lane = threadIdx.x & 31;
    __syncwarp();
    for (u32 row = threadIdx.x >> 5; row < block.rows; row += THREADS / 32) {
        u8* start = block.target + row * block.target_row;
        u32 skip = (u32)(u64)start & 31, end = skip + block.cols;
        u8* line = start - skip;
        const u8* codes = (const u8*)(kept + row * KEPT_WORDS);
        if (lane < 8) {
            // Four lanes for the first word, and four for the last.
            u32 word = lane < 4 ? skip / 4 : end / 4, at = 4 * word + lane % 4;
            bool is_end = lane < 4 ? !follows && (skip % 4 != 0 || end < 4 * word + 4) : word != skip / 4 && word < 32;
            if (is_end && at >= skip && at < end) line[at] = codes[4 * min(word, 8u) + lane % 4];
        }
        if (!goes_on && lane < skip && 128 + lane < end) line[128 + lane] = codes[lane];
    }
    __syncwarp();
}

__device__ __forceinline__ u32 load_u16(u32 address) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address));
    return value;
}

__device__ __forceinline__ u32 load_u32(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}

// The codes of two elements that are kept in a pair.
template <int KIND, int ROUNDED>
__device__ __forceinline__ u32 codes_of(u32 pair, float multiplier) {
    float a = KIND == F16 ? f16_value(pair & 0xffffu) : bf16_value(pair & 0xffffu);
    float b = KIND == F16 ? f16_value(pair >> 16) : __uint_as_float(pair & 0xffff0000u);
    if (KIND == F16 && ROUNDED == ALWAYS) {
        pair = rounded_pair(a, b);
        a = bf16_value(pair & 0xffffu), b = __uint_as_float(pair & 0xffff0000u);
    }
    return codes2(__fmul_rn(a, multiplier), __fmul_rn(b, multiplier));
}

// Memory is fast where sectors of 32 bytes are written whole, so a warp writes 128 bytes that begin with one. Lanes that have bytes in front
// of the row there have its last columns instead: their codes are kept until the next block of the same rows comes, which the same block of
// threads has (`goes_on`), and are put in front of its codes (`follows`).
// Lane l has the columns 4 l - skip .. + 4, modulo 128, of the rows t / 32 + 8 i, where a row has `skip` bytes of its sector in front of it.
// Rows that are 32 apart skip as many; those that are 8 apart begin at the same place of their stage's first vector.
template <int KIND, int ROUNDED>
__device__ __forceinline__ void encode_rows(
    u32 mode, const Job* job, const Block& block, Reader<OddRows>& reader, u32* shared, u32* kept, bool follows, bool goes_on, u64* failed) {
    constexpr u32 SIZE = KIND == F32 ? 4 : 2, HALVES = SIZE / 2, STEPS = 4 / HALVES;
    constexpr u32 PITCH = SIZE == 4 ? OddRows::PITCH_F32 : OddRows::PITCH_16;
    // Elements of F32 are kept rounded.
    constexpr int KEPT = KIND == F32 ? BF16 : KIND;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, cols = block.cols;
    u8* target = block.target + warp * block.target_row;
    u32 first = (u32)(u64)target, step = 8 * (u32)block.target_row;
    bool inside = OddRows::is_inside(job, block), whole = block.rows == 128 && cols == 128;
    u32 data[16][2];
#pragma unroll
    for (u32 half = 0; half < HALVES; half++) {
        u8* stage = (u8*)reader.next(HALVES == 2);
        __syncthreads();
        if (!inside || !whole) {
            OddRows::complete<SIZE>(block, half, inside, stage);
            __syncthreads();
        }
        u32 row = (u32)__cvta_generic_to_shared(stage) + warp * PITCH;
        row += ((u32)(u64)block.source + warp * (u32)block.source_row) & 15;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 skip = (first + i * step) & 31, from[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) from[j] = row + 8 * i * PITCH + SIZE * ((4 * lane + j - skip) & 127);
#pragma unroll
            for (u32 n = 0; n < STEPS; n++) {
                u32 bits[4], *pairs = data[4 * (half * STEPS + n) + i];
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    u32 at = from[j] + 32 * n * PITCH;
                    bits[j] = SIZE == 4 ? load_u32(at) : load_u16(at);
                }
                if (KIND == F32) {
                    pairs[0] = rounded_pair(__uint_as_float(bits[0]), __uint_as_float(bits[1]));
                    pairs[1] = rounded_pair(__uint_as_float(bits[2]), __uint_as_float(bits[3]));
                } else {
                    pairs[0] = bits[0] | bits[1] << 16, pairs[1] = bits[2] | bits[3] << 16;
                }
            }
            // Without it, the compiler reads all elements before it packs any, for which there are not enough registers.
            __syncwarp();
        }
        // The other half is read over what the last one had; after a tile, the block's maximum is waited for.
        if (half + 1 < HALVES) __syncthreads();
    }
    u32 top = 0;
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        top = __vmaxu2(top, __vmaxu2(data[i][0] & 0x7fff7fffu, data[i][1] & 0x7fff7fffu));
    }
    top = block_max(max(top & 0xffffu, top >> 16), shared);
    float m = settle(mode, widened(KEPT, ROUNDED == ALWAYS, top), block, failed).multiplier;
    u64 stride = 32 * block.target_row;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 skip = (first + i * step) & 31;
        // The bytes of the word that are in front of the row.
        u32 before = skip > 4 * lane ? min(skip - 4 * lane, 4u) : 0, end = skip + cols;
        u32 others = follows ? (u32)((1ull << (8 * before)) - 1) : 0;
        bool full = follows || (before == 0 && 4 * lane + 3 < end), keeps = lane < 8 || lane == end / 4;
        u32 place = (u32)__cvta_generic_to_shared(kept) + ((warp + 8 * i) * KEPT_WORDS + min(lane, 8u)) * 4;
        u8* word = target + i * 8 * block.target_row + (int)(4 * lane - skip);
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            u32* pairs = data[4 * n + i];
            u32 codes = codes_of<KEPT, ROUNDED>(pairs[0], m) | codes_of<KEPT, ROUNDED>(pairs[1], m) << 16;
            u32 at = place + n * 32 * KEPT_WORDS * 4, last = load_u32(at);
            if (keeps) asm volatile("st.shared.u32 [%0], %1;" :: "r"(at), "r"(codes) : "memory");
            if (full && warp + 8 * i + 32 * n < block.rows) *(u32*)word = (last & others) | (codes & ~others);
            word += stride;
        }
    }
    if (!follows || !goes_on) write_ends(block, kept, follows, goes_on);
}

// `failed` is all ones, and gets the lowest job and block that has no finite form. `base` is where the
// bucket begins, for the digest, which is added to `total`.
template <bool WIDE>
__device__ __forceinline__ void encode_tiles(
    const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed, u64* total,
    u64 base) {
    __shared__ u32 tops[2][THREADS / 32];
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
        Block block = block_of(job, tile, base);
        bool aligned = (job->cols & 7) == 0 && ((job->source | job->target) & 15) == 0
            && job->block_rows <= 128 && job->block_cols <= 128;
        u32* shared = tops[parity];
        parity ^= 1;
        if (!aligned) {
            block.flags &= ~SUMMED;
            encode_any(mode, kind, block, shared, failed);
        } else if (kind == BF16) {
            sum += encode_block<BF16>(mode, block, shared, failed).sum;
        } else if (kind == F16) {
            sum += encode_block<F16>(mode, block, shared, failed).sum;
        } else if (WIDE) {
            sum += encode_block<F32>(mode, block, shared, failed).sum;
        }
    }
    add_to(total, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
encode(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed, u64* total,
       u64 base) {
    encode_tiles<false>(jobs, firsts, count, tiles, mode, failed, total, base);
}

// Blocks of BF16 and F16 whose columns, and the place of whose first code in the bucket, are multiples of 128 bytes, without a digest. Codes
// that are as in the copy at `old`, which has the bucket's layout, are not written. `marks` gets a bit for each 8 bytes of them.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
encode_compared(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed, u64 base, const u8* old, u8* marks) {
    __shared__ u32 tops[2][THREADS / 32];
    u32 parity = 0;
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const Job* job = jobs + tile.job;
        Block block = block_of(job, tile, base);
        Against against = {old + block.place, marks + block.place / 64};
        u32* shared = tops[parity];
        parity ^= 1;
        if (job->kind == BF16) {
            encode_block<BF16, true>(mode, block, shared, failed, against);
        } else {
            encode_block<F16, true>(mode, block, shared, failed, against);
        }
    }
}

// Blocks of F32 take twice the registers: a launch that has one runs with half the threads in flight.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
encode_wide(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed,
            u64* total, u64 base) {
    encode_tiles<true>(jobs, firsts, count, tiles, mode, failed, total, base);
}

#if __CUDA_ARCH__ >= 900
// Jobs that are copies, from and to multiples of 16 bytes.
struct Copies {
    static constexpr u32 RUN = 1;

    const Job* jobs;
    const u32* firsts;
    u32 count, tiles;
    u64* sums;
    u64 base;

    __device__ __forceinline__ Rows rows(Walk* walk) const {
        Tile tile = tile_of(walk, firsts, count, tiles);
        const Job* job = jobs + tile.job;
        u64 start = (u64)tile.index * COPY_TILE;
        Rows r;
        r.source = (const u8*)job->source + start;
        r.target = (u8*)job->target + start;
        r.source_row = r.target_row = 0;
        r.place = (job->flags & FROM ? (u64)r.source : (u64)r.target) - base;
        r.rows = 1, r.bytes = (u32)min((u64)COPY_TILE, job->bytes - start);
        r.flags = job->flags | FAST;
        r.slot = 0;
        return r;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 3)
copy_bulk(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32, u64*, u64* total, u64 base) {
    Copies table = {jobs, firsts, count, tiles, total, base};
    copy_tiles(table);
}
#endif

// Blocks of at most 128 x 128 whose rows begin anywhere; those of F32 are rounded. Their codes are not added to the digest.
extern "C" __global__ void __launch_bounds__(THREADS, ODD_BLOCKS)
encode_odd(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u32 mode, u64* failed, u64*, u64 base) {
    extern __shared__ uint4 stage[];
    __shared__ u32 tops[2][THREADS / 32], kept[128 * KEPT_WORDS];
    u32 parity = 0;
    bool follows = false;
    // Long runs: at their ends, sectors are written in two parts.
    Walk w = walk_of(tiles, 32);
    Reader<OddRows> reader = {jobs, firsts, count, tiles, (u8*)stage, w};
    for (reader.begin(); w.tile < tiles; go_on(&w)) {
        Tile tile = tile_of(&w, firsts, count, tiles);
        const Job* job = jobs + tile.job;
        Block block = block_of(job, tile, base);
        // The next tile of the run is the next block of these rows, and whole.
        u32 across = tile.index % job->blocks, end = (across + 2) * 128;
        bool goes_on = has_next(w, tiles) && job->block_cols == 128 && end <= job->cols;
        u32* shared = tops[parity];
        parity ^= 1;
        bool precast = block.flags & PRECAST;
        if (job->kind == BF16) {
            encode_rows<BF16, NEVER>(mode, job, block, reader, shared, kept, follows, goes_on, failed);
        } else if (job->kind == F16 && precast) {
            encode_rows<F16, ALWAYS>(mode, job, block, reader, shared, kept, follows, goes_on, failed);
        } else if (job->kind == F16) {
            encode_rows<F16, NEVER>(mode, job, block, reader, shared, kept, follows, goes_on, failed);
        } else {
            encode_rows<F32, ALWAYS>(mode, job, block, reader, shared, kept, follows, goes_on, failed);
        }
        follows = goes_on;
    }
}

// Adds the scales of a table to the digest, once its launch is done. A warp has those of 64 tiles. Two scales are a word; the last word of a
// job is filled up with zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
sum_scales(const Job* jobs, const u32* firsts, u32 count, u32 tiles, u64* total, u64 base) {
    u32 lane = threadIdx.x & 31, all = gridDim.x * (THREADS / 32);
    u64 sum = 0;
    for (u32 w = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5); (u64)w * 64 < tiles; w += all) {
        u32 t = w * 64, end = min(t + 64, tiles);
        for (Tile tile = find(firsts, count, t); t < end; tile.job++, tile.index = 0) {
            const Job* job = jobs + tile.job;
            u32 next = tile.job + 1 < count ? firsts[tile.job + 1] : tiles, here = min(next, end) - t, scales = next - firsts[tile.job];
            t += here;
            if (!(job->flags & SCALES)) continue;
            const u32* values = (const u32*)job->scales;
            u64 place = (job->scales - base) >> 3;
            // The word of which the first scale is another warp's is, too.
            for (u32 word = (tile.index + 1) / 2 + lane; 2 * word < tile.index + here; word += 32) {
                u32 high = 2 * word + 1 < scales ? values[2 * word + 1] : 0;
                sum += product_at(place + word, (u64)high << 32 | values[2 * word]);
            }
        }
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
