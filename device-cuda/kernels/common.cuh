// What all kernels have: types, tiles and the digest.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 256
// As in src/table.rs.
#define COPY_STEPS 4
#define COPY_TILE (THREADS * 16 * COPY_STEPS)

struct Tile {
    u32 job;
    u32 index;          // within the job
};

// The job that tile `t` belongs to: the last whose first tile is not after it. `firsts` has the first tile
// of each of `jobs` jobs. A warp looks at 32 places at a time, so that two or three looks find it.
__device__ __forceinline__ Tile find(const u32* firsts, u32 jobs, u32 t) {
    u32 lane = threadIdx.x & 31, low = 0, high = jobs;
    while (high - low > 1) {
        u32 step = (high - low + 31) / 32;
        u32 at = low + lane * step;
        // Lane 0 is at a job whose first tile is not after `t`.
        u32 found = __ballot_sync(0xffffffffu, at < high && firsts[at] <= t);
        low += (31 - __clz(found)) * step;
        high = min(high, low + step);
    }
    Tile tile = {low, t - firsts[low]};
    return tile;
}

// The tiles that a block of threads has: some in a row, at most `most`, as long as there are enough for all.
struct Walk {
    u32 run, tile;
    u32 job, end;       // the job of the last tile, and the end of its tiles
};

__device__ __forceinline__ Walk walk_of(u32 tiles, u32 most) {
    u32 run = min(max(tiles / (gridDim.x * 4), 1u), most);
    Walk w = {run, blockIdx.x * run, 0, 0};
    return w;
}

__device__ __forceinline__ void go_on(Walk* w) {
    w->tile++;
    if (w->tile % w->run == 0) w->tile += (gridDim.x - 1) * w->run;
}

// Whether the next tile is the next one of the run.
__device__ __forceinline__ bool has_next(const Walk& w, u32 tiles) {
    return (w.tile + 1) % w.run != 0 && w.tile + 1 < tiles;
}

__device__ __forceinline__ Tile tile_of(Walk* w, const u32* firsts, u32 count, u32 tiles) {
    // Tiles come in ascending order.
    if (w->tile >= w->end) {
        w->job = find(firsts, count, w->tile).job;
        w->end = w->job + 1 < count ? firsts[w->job + 1] : tiles;
    }
    Tile tile = {w->job, w->tile - firsts[w->job]};
    return tile;
}

__device__ __forceinline__ uint4 load16(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ uint2 load8(const u8* address) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
}

__device__ __forceinline__ float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float f16_value(u32 bits) {
    float value;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(bits));
    return value;
}

// The keys of engine-core's digest.
__constant__ u32 LOW[8] = {@LOW@};
__constant__ u32 HIGH[8] = {@HIGH@};
__constant__ u32 LOW_STEP[8] = {@LOW_STEP@};
__constant__ u32 HIGH_STEP[8] = {@HIGH_STEP@};

// The digest's keys of one lane. Kept in registers over many words: threads of a warp have different
// lanes, and constant memory serves one address at a time.
struct Keys {
    u32 low, high, low_step, high_step;
};

__device__ __forceinline__ Keys keys_of(u64 word) {
    u32 lane = (u32)word & 7;
    Keys k = {LOW[lane], HIGH[lane], LOW_STEP[lane], HIGH_STEP[lane]};
    return k;
}

// The product of a word with these halves in a row of the bucket.
__device__ __forceinline__ u64 product(Keys k, u32 row, u32 low, u32 high) {
    return (u64)(low + k.low + row * k.low_step) * (high + k.high + row * k.high_step);
}

// The same for a word anywhere in the bucket.
__device__ __forceinline__ u64 product_at(u64 index, u64 word) {
    return product(keys_of(index), (u32)(index >> 3), (u32)word, (u32)(word >> 32));
}

__device__ __forceinline__ void add_to(u64* sum, u64 mine) {
    for (int lane = 16; lane > 0; lane >>= 1) mine += __shfl_xor_sync(0xffffffffu, mine, lane);
    if ((threadIdx.x & 31) == 0 && mine != 0) atomicAdd(sum, mine);
}

// Writes the lower bytes of a word.
__device__ __forceinline__ void store_bytes(u8* target, u64 word, u32 bytes) {
    if (bytes == 8 && ((u64)target & 7) == 0) {
        *(u64*)target = word;
        return;
    }
    for (u32 i = 0; i < bytes; i++) target[i] = (u8)(word >> (8 * i));
}
