// Parts of tensors, written straight to where they are used: behind `bucket.cu`, whose blocks, copies and digest they are made of.
//
// `place_rows`, `place_blocks` and `place_any` write parts of a trainer's weights into memory that rollouts lend, of this device or of a peer; `check`
// digests what is there; `maxima` finds the largest magnitudes of blocks that several trainers have a part of.

// As `Entry` in src/placed.rs. Rows and matrices are so many bytes apart.
struct Part {
    u64 source;         // device address of the first element
    u64 target;         // device address of the first code or byte
    u64 place;          // where that is in the memory that is lent, which the digest is of
    u64 scales;         // device address of the scale of the first block
    u64 scales_place;
    u64 known;          // device address of the largest magnitude of the first block, or 0
    u64 source_matrix, source_row;
    u64 target_matrix, target_row;
    u64 scales_matrix, scales_row;
    u32 known_matrix, known_row;    // in numbers
    u32 kind;           // COPY, BF16, F16, F32, or SCALES_ONLY
    u32 mode;
    u32 rows;
    u32 cols;           // elements; of copies bytes
    u32 block_rows, block_cols;
    u32 first_row, first_col;       // rows of the first band, and columns of its first block: it may begin within one
    u32 bands, blocks;
    u32 flags;
    u32 slot;           // the sum that it adds to
};

// Beside PRECAST and those of `rows.cuh`: the scales of the first band, or of the first column of blocks, come with another part.
enum { NO_FIRST_BAND = 64, NO_FIRST_COL = 128 };
enum { SCALES_ONLY = 4 };

struct Area {
    u32 matrix, band, block;
    u32 top, left, rows, cols;
};

__device__ __forceinline__ Area area_of(const Part* part, u32 index) {
    Area a;
    u32 row = index / part->blocks;
    a.block = index % part->blocks;
    a.matrix = row / part->bands;
    a.band = row % part->bands;
    a.top = a.band ? part->first_row + (a.band - 1) * part->block_rows : 0;
    a.left = a.block ? part->first_col + (a.block - 1) * part->block_cols : 0;
    a.rows = min(a.band ? part->block_rows : part->first_row, part->rows - a.top);
    a.cols = min(a.block ? part->block_cols : part->first_col, part->cols - a.left);
    return a;
}

// The product of a scale, which is a part of a word.
__device__ __forceinline__ u64 scale_product(u64 place, u32 bits) {
    return product_at(place >> 3, (u64)bits << (8 * (place & 7)));
}

// A block of threads has so many tiles of rows one after the other. So it seldom has to look for the next part, or to add to a sum that others
// add to at the same time. Of blocks it has every gridDim.x-th: neighbours are in the same rows of memory, and several read them together.
#define ROWS_RUN 8

// `failed` is all ones, and gets the lowest slot and block that has no finite form. `sums` has a number for each slot. Each kind of part
// has a kernel of its own, with the registers that it needs and no more.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
place_rows(const Part* parts, const u32* firsts, u32 count, u32 tiles, u64*, u64* all) {
    Sums sums = {all, 0, ~0u};
    for (Walk w = walk_of(tiles, ROWS_RUN); w.tile < tiles; go_on(&w)) {
        Tile tile = tile_of(&w, firsts, count, tiles);
        const Part* part = parts + tile.job;
        Area a = area_of(part, tile.index);
        take_slot(&sums, part->slot);
        u64 to = a.matrix * part->target_matrix + a.top * part->target_row + a.left;
        u64 from = a.matrix * part->source_matrix + a.top * part->source_row + a.left;
        sums.mine += pass_rows<true>(
            (const u8*)part->source + from, part->source_row, (u8*)part->target + to, part->target_row, part->place + to, a.rows,
            a.cols, part->flags);
    }
    take_slot(&sums, ~0u);
}

#if __CUDA_ARCH__ >= 900
// Parts that are copied, and whose tiles have one row or two: for shorter ones the bulk engine is slower than threads.
struct Copied {
    static constexpr u32 RUN = ROWS_RUN;

    const Part* parts;
    const u32* firsts;
    u32 count, tiles;
    u64* sums;

    __device__ __forceinline__ Rows rows(Walk* walk) const {
        Tile tile = tile_of(walk, firsts, count, tiles);
        const Part* part = parts + tile.job;
        Area a = area_of(part, tile.index);
        u64 to = a.matrix * part->target_matrix + a.top * part->target_row + a.left;
        u64 from = a.matrix * part->source_matrix + a.top * part->source_row + a.left;
        Rows r = {(const u8*)part->source + from, (u8*)part->target + to, part->source_row, part->target_row, part->place + to,
                  a.rows, a.cols, part->flags, part->slot};
        return r;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 3)
place_bulk(const Part* parts, const u32* firsts, u32 count, u32 tiles, u64*, u64* sums) {
    Copied table = {parts, firsts, count, tiles, sums};
    copy_tiles(table);
}
#endif

// Blocks of elements of two bytes that are FAST, or ANY others.
template <bool ANY>
__device__ __forceinline__ void place_parts(
    const Part* parts, const u32* firsts, u32 count, u32 tiles, u64* failed, u64* all) {
    __shared__ u32 tops[2][THREADS / 32];
    Sums sums = {all, 0, ~0u};
    u32 parity = 0;
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const Part* part = parts + tile.job;
        Area a = area_of(part, tile.index);
        take_slot(&sums, part->slot);
        u32 kind = part->kind, flags = part->flags;
        u64 to = a.matrix * part->target_matrix + a.top * part->target_row + a.left;
        u64 from = a.matrix * part->source_matrix + a.top * part->source_row;
        u64 scale = a.matrix * part->scales_matrix + a.band * part->scales_row + a.block * 4;
        bool has_scale = !(a.band == 0 && (flags & NO_FIRST_BAND)) && !(a.block == 0 && (flags & NO_FIRST_COL));
        Block block;
        block.source = (const u8*)part->source + from + (u64)a.left * (kind == F32 ? 4 : 2);
        block.target = (u8*)part->target + to;
        block.source_row = part->source_row;
        block.target_row = part->target_row;
        block.place = part->place + to;
        block.scale = has_scale ? (float*)(part->scales + scale) : 0;
        block.known = part->known
            ? (const u32*)part->known + a.matrix * part->known_matrix + a.band * part->known_row + a.block : 0;
        block.number = (u64)part->slot << 32 | tile.index;
        block.rows = a.rows;
        block.cols = a.cols;
        block.flags = flags;
        u32* shared = tops[parity];
        parity ^= 1;
        Encoded encoded;
        if (ANY) {
            encoded = flags & FAST ? encode_block<F32>(part->mode, block, shared, failed)
                                   : encode_any(part->mode, kind, block, shared, failed);
        } else if (kind == BF16) {
            encoded = encode_block<BF16>(part->mode, block, shared, failed);
        } else {
            encoded = encode_block<F16>(part->mode, block, shared, failed);
        }
        sums.mine += encoded.sum;
        if (has_scale && (flags & SUMMED) && threadIdx.x == 0) {
            sums.mine += scale_product(part->scales_place + scale, encoded.scale.bits);
        }
    }
    take_slot(&sums, ~0u);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
place_blocks(const Part* parts, const u32* firsts, u32 count, u32 tiles, u64* failed, u64* sums) {
    place_parts<false>(parts, firsts, count, tiles, failed, sums);
}

// Blocks of F32, which take twice the registers, and blocks that are not FAST.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
place_any(const Part* parts, const u32* firsts, u32 count, u32 tiles, u64* failed, u64* sums) {
    place_parts<true>(parts, firsts, count, tiles, failed, sums);
}

// Digests parts of memory: copies without a source, and scales.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
check(const Part* parts, const u32* firsts, u32 count, u32 tiles, u64*, u64* all) {
    Sums sums = {all, 0, ~0u};
    for (Walk w = walk_of(tiles, ROWS_RUN); w.tile < tiles; go_on(&w)) {
        Tile tile = tile_of(&w, firsts, count, tiles);
        const Part* part = parts + tile.job;
        Area a = area_of(part, tile.index);
        take_slot(&sums, part->slot);
        u64 at = a.matrix * part->target_matrix + a.top * part->target_row + a.left;
        const u8* bytes = (const u8*)part->target + at;
        u64 place = part->place + at;
        if (part->kind == SCALES_ONLY) {
            u32 each = a.cols / 4;
            for (u32 n = threadIdx.x; n < a.rows * each; n += THREADS) {
                u64 from = n / each * part->target_row + n % each * 4;
                sums.mine += scale_product(place + from, *(const u32*)(bytes + from));
            }
            continue;
        }
        sums.mine += pass_rows<false>(
            bytes, part->target_row, 0, part->target_row, place, a.rows, a.cols, part->flags | SUMMED);
    }
    take_slot(&sums, ~0u);
}

// The largest magnitude of each block of a part, over the elements that are in it, to where `known` points: the bits of the
// source's type, with HAS_NAN if they are none of a number.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
maxima(const Part* parts, const u32* firsts, u32 count, u32 tiles, u64*, u64*) {
    __shared__ u32 tops[2][THREADS / 32];
    u32 parity = 0, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const Part* part = parts + tile.job;
        Area a = area_of(part, tile.index);
        u32 kind = part->kind, top = 0;
        u64 from = a.matrix * part->source_matrix + a.top * part->source_row + (u64)a.left * (kind == F32 ? 4 : 2);
        for (u32 row = warp; row < a.rows; row += THREADS / 32) {
            const u8* source = (const u8*)part->source + from + row * part->source_row;
#pragma unroll 4
            for (u32 col = lane; col < a.cols; col += 32) top = max(top, magnitude(source, kind, col));
        }
        u32* shared = tops[parity];
        parity ^= 1;
        top = block_max(top, shared);
        u32 most = kind == BF16 ? 0x7f80 : kind == F16 ? 0x7c00 : 0x7f800000u;
        if (threadIdx.x == 0) {
            u32 at = a.matrix * part->known_matrix + a.band * part->known_row + a.block;
            ((u32*)part->known)[at] = top > most ? top | HAS_NAN : top;
        }
    }
}
