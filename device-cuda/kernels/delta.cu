// Changes of weights: found against a copy of what travelled before, applied to such a copy. engine-core's `changes.rs` has the format.
//
// A block of threads does a tile, which has at most 64 KiB: a thread has 16 vectors of 16 bytes. `common.cuh` is in front of this.

#define TILE_VECTORS 4096
#define EACH (TILE_VECTORS / THREADS)

// The form of a tile's changes, in the upper two bits of its word.
enum { SAME = 0, POSITIONS = 1, MARKS = 2, ALL = 3 };

// As `DeltaJob` in src/delta/table.rs.
struct DeltaJob {
    u64 old;            // device address of the copy, a multiple of 16
    u64 now;            // device address of the new bytes, a multiple of 16; 0 where none are read
    u64 place;          // device address where the changes of each tile go first: as many bytes as there are
    u64 bytes;
    u64 word;           // the number of the first word in the weight's digest, a multiple of 8
    u64 marks;          // device address of a bit for each 8 new bytes: 0 where they are as in the copy, and not there; 0 if all are there
    u32 tile;           // bytes, a multiple of 64
    u32 unit;           // bytes that change together: 1, 2, 4 or 8
};

// Less than 16 bytes, as a vector.
__device__ __forceinline__ uint4 load_bytes(const u8* address, u32 bytes) {
    u64 low = 0, high = 0;
#pragma unroll 1
    for (u32 i = 0; i < bytes; i++) {
        if (i < 8) low |= (u64)address[i] << 8 * i;
        else high |= (u64)address[i] << 8 * (i - 8);
    }
    return make_uint4((u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32));
}

// A vector, of which there are only so many bytes; zeros behind them.
__device__ __forceinline__ uint4 load_part(const u8* address, u32 bytes) {
    if (bytes >= 16) return load16(address);
    return load_bytes(address, bytes);
}

// A bit for each unit of four bytes that differs, and for units of eight: whether any does.
template <u32 UNIT>
__device__ __forceinline__ u32 marks_of_word(u32 old, u32 now) {
    if (UNIT == 1) return ((__vcmpne4(old, now) & 0x08040201u) * 0x01010101u) >> 24;
    if (UNIT == 2) {
        u32 differ = __vcmpne2(old, now);
        return (differ & 1u) | (differ >> 16 & 2u);
    }
    return old != now;
}

template <u32 UNIT>
__device__ __forceinline__ u32 marks_of(uint4 old, uint4 now) {
    u32 a = marks_of_word<UNIT>(old.x, now.x), b = marks_of_word<UNIT>(old.y, now.y);
    u32 c = marks_of_word<UNIT>(old.z, now.z), d = marks_of_word<UNIT>(old.w, now.w);
    if (UNIT == 8) return (a | b) | (c | d) << 1;
    constexpr u32 BITS = UNIT == 8 ? 1 : 4 / UNIT;
    return a | b << BITS | c << 2 * BITS | d << 3 * BITS;
}

// The sum over all threads of lower number; `*all` is that over all threads. `shared` has a number for each warp.
__device__ __forceinline__ u32 sum_before(u32 mine, u32* shared, u32* all) {
    u32 lane = threadIdx.x & 31, up_to = mine;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(0xffffffffu, up_to, step);
        if (lane >= step) up_to += other;
    }
    if (lane == 31) shared[threadIdx.x >> 5] = up_to;
    __syncthreads();
    u32 before = up_to - mine, total = 0;
#pragma unroll
    for (u32 warp = 0; warp < THREADS / 32; warp++) {
        if (warp < threadIdx.x >> 5) before += shared[warp];
        total += shared[warp];
    }
    *all = total;
    return before;
}

// A tile of a weight.
struct Piece {
    u8* old;
    const u8* now;
    u64 word;           // the number of its first word in the digest
    u32 bytes;
};

__device__ __forceinline__ Piece piece_of(const DeltaJob* job, u32 index) {
    u64 start = (u64)index * job->tile;
    Piece piece = {(u8*)job->old + start, (const u8*)job->now + start, job->word + start / 8,
                   (u32)min((u64)job->tile, job->bytes - start)};
    return piece;
}

// Compares a tile, and leaves its marks. Returns the change of the digest's sum.
template <u32 UNIT>
__device__ __forceinline__ u64 compare(const Piece& piece, u16* marks) {
    u64 first = piece.word + 2 * threadIdx.x, sum = 0;
    Keys even = keys_of(first), odd = keys_of(first + 1);
#pragma unroll 1
    for (u32 step = 0; step < EACH; step += 4) {
        uint4 old[4], now[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 at = 16 * (threadIdx.x + (step + i) * THREADS);
            bool is_there = at < piece.bytes;
            old[i] = is_there ? load_part(piece.old + at, piece.bytes - at) : make_uint4(0, 0, 0, 0);
            now[i] = is_there ? load_part(piece.now + at, piece.bytes - at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 found = marks_of<UNIT>(old[i], now[i]);
            marks[threadIdx.x + (step + i) * THREADS] = (u16)found;
            if (found) {
                // Vectors of a thread are whole rows apart. A word that has not changed adds what it takes off.
                u32 row = (u32)(first >> 3) + (step + i) * (THREADS * 2 / 8);
                sum += product(even, row, now[i].x, now[i].y) - product(even, row, old[i].x, old[i].y);
                // Words that are not there are zeros in both.
                sum += product(odd, row, now[i].z, now[i].w) - product(odd, row, old[i].z, old[i].w);
            }
        }
    }
    return sum;
}

// Marks of EACH consecutive vectors, two for each: those of a thread.
struct Marked {
    u32 bits;
    u32 all;            // those that there are
};

__device__ __forceinline__ Marked marked_of(const DeltaJob* job, u32 index) {
    u64 start = (u64)index * job->tile;
    u32 words = (u32)(min((u64)job->tile, job->bytes - start) + 7) / 8, first = threadIdx.x * 2 * EACH;
    Marked marked = {0, 0};
    if (first >= words) return marked;
    u32 here = min(words - first, 32u);
    const u8* from = (const u8*)job->marks + start / 64 + first / 8;
    marked.all = ~0u >> (32 - here);
    if (((u64)from & 3) == 0 && here == 32) {
        marked.bits = *(const u32*)from;
    } else {
#pragma unroll 1
        for (u32 i = 0; 8 * i < here; i++) marked.bits |= (u32)from[i] << 8 * i;
        marked.bits &= marked.all;
    }
    return marked;
}

// 8 bytes, of which there may be less; zeros behind them. Memory of copies and of what is encoded ends at multiples of 256 bytes.
__device__ __forceinline__ u64 load_word(const u8* address, u32 bytes) {
    u64 word = *(const u64*)address;
    return bytes < 8 ? word & ((1ull << 8 * bytes) - 1) : word;
}

// As `compare`, where new bytes are there only where they are marked. A thread compares consecutive words.
template <u32 UNIT>
__device__ __forceinline__ u64 compare_marked(const Piece& piece, u32 bits, uint4* all) {
    uint4* own = all + threadIdx.x * (EACH / 8);
#pragma unroll
    for (u32 i = 0; i < EACH / 8; i++) own[i] = make_uint4(0, 0, 0, 0);
    u64 sum = 0;
#pragma unroll 1
    for (; bits != 0; bits &= bits - 1) {
        u32 word = threadIdx.x * 2 * EACH + __ffs(bits) - 1;
        u64 old = load_word(piece.old + 8 * word, piece.bytes - 8 * word);
        u64 now = load_word(piece.now + 8 * word, piece.bytes - 8 * word);
        if (old == now) continue;
        sum += product_at(piece.word + word, now) - product_at(piece.word + word, old);
        u32 low = marks_of_word<UNIT>((u32)old, (u32)now), high = marks_of_word<UNIT>((u32)(old >> 32), (u32)(now >> 32));
        u32 found = UNIT == 8 ? 1 : low | high << (UNIT == 8 ? 0 : 4 / UNIT);
        ((u16*)all)[word / 2] |= (u16)(found << word % 2 * (8 / UNIT));
    }
    return sum;
}

// Brings the new bytes of a tile that are not there: they are those of the copy.
__device__ __forceinline__ void complete(const Piece& piece, const DeltaJob* job, u32 index) {
    Marked marked = marked_of(job, index);
#pragma unroll 1
    for (u32 left = marked.all & ~marked.bits; left != 0; left &= left - 1) {
        u32 at = 8 * (threadIdx.x * 2 * EACH + __ffs(left) - 1);
        u32 bytes = min(8u, piece.bytes - at);
        store_bytes((u8*)piece.now + at, load_word(piece.old + at, bytes), bytes);
    }
}

template <u32 UNIT>
__device__ __forceinline__ void copy_unit(u8* to, const u8* from) {
#pragma unroll
    for (u32 i = 0; i < UNIT; i++) to[i] = from[i];
}

// The bytes in which a unit's bits are, of numbers that may begin anywhere.
__device__ __forceinline__ u32 position(const u8* positions, u32 at) {
    return positions[2 * at] | (u32)positions[2 * at + 1] << 8;
}

// Leaves the changes of a tile at `places`, and returns its word and their length. All bytes of a tile stay where they are.
template <u32 UNIT>
__device__ __forceinline__ uint2 find_in_tile(const DeltaJob* job, u32 index, uint4* all, u32* counts, u64* results) {
    Piece piece = piece_of(job, index);
    u64 sum;
    if (job->marks == 0) {
        sum = compare<UNIT>(piece, (u16*)all);
    } else {
        Marked marked = marked_of(job, index);
        if (!__syncthreads_or(marked.bits != 0)) return make_uint2(SAME << 30, 0);
        sum = compare_marked<UNIT>(piece, marked.bits, all);
    }
    __syncthreads();
    u32 mine = 0;
#pragma unroll
    for (u32 i = 0; i < EACH / 8; i++) {
        uint4 four = all[threadIdx.x * (EACH / 8) + i];
        mine += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
    u32 count;
    u32 rank = sum_before(mine, counts, &count);
    if (count == 0) return make_uint2(SAME << 30, 0);
    add_to(results, sum);
    if (threadIdx.x == 0) atomicAdd(results + 1, (u64)count);
    u32 map = (piece.bytes / UNIT + 7) / 8;
    u32 sparse = count * (2 + UNIT), mapped = map + count * UNIT;
    if (min(sparse, mapped) >= piece.bytes) {
        if (job->marks) complete(piece, job, index);
        return make_uint2((u32)ALL << 30, piece.bytes);
    }
    u32 form = sparse <= mapped ? POSITIONS : MARKS;
    u8* places = (u8*)job->place + (u64)index * job->tile;
    u8* values = places + (form == POSITIONS ? 2 * count : map);
    constexpr u32 UNITS_OF = 16 / UNIT;
    const u16* own = (const u16*)all + threadIdx.x * EACH;
    // Loops of few rounds are not unrolled: for four units that takes the compiler longer than anything else.
#pragma unroll 1
    for (u32 i = 0; mine != 0 && i < EACH; i++) {
        u32 left = own[i];
#pragma unroll 1
        while (left != 0) {
            u32 unit = (threadIdx.x * EACH + i) * UNITS_OF + __ffs(left) - 1;
            left &= left - 1;
            if (form == POSITIONS) places[2 * rank] = (u8)unit, places[2 * rank + 1] = (u8)(unit >> 8);
            copy_unit<UNIT>(values + rank * UNIT, piece.now + unit * UNIT);
            rank++;
        }
    }
    if (form == MARKS) {
        // Bits of consecutive vectors, of which each has UNITS_OF.
#pragma unroll 1
        for (u32 at = threadIdx.x; at < map; at += THREADS) {
            u32 byte = 0;
#pragma unroll
            for (u32 bits = 0; bits < 8; bits += UNITS_OF) {
                u32 bit = 8 * at + bits;
                byte |= (u32)((const u16*)all)[bit / UNITS_OF] >> bit % UNITS_OF << bits;
            }
            places[at] = (u8)byte;
        }
    }
    return make_uint2(form << 30 | count, min(sparse, mapped));
}

// Compares new bytes with copies. Of each tile, `words` gets the word and `lens` the length of its values, which are left where the job says;
// of each job, `results` gets the change of its digest's sum and the number of units that changed. They are 0 before. With four blocks of
// threads on a multiprocessor, the compiler needs local memory for some devices.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
find_changes(const DeltaJob* jobs, const u32* firsts, u32 count, u32 tiles, u64* results, u32* words, u32* lens) {
    __shared__ uint4 marks[TILE_VECTORS / 8];   // 16 bits for each vector
    __shared__ u32 counts[THREADS / 32];
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const DeltaJob* job = jobs + tile.job;
        u64* own = results + 2 * tile.job;
        uint2 found;
        if (job->unit == 1) found = find_in_tile<1>(job, tile.index, marks, counts, own);
        else if (job->unit == 2) found = find_in_tile<2>(job, tile.index, marks, counts, own);
        else if (job->unit == 4) found = find_in_tile<4>(job, tile.index, marks, counts, own);
        else found = find_in_tile<8>(job, tile.index, marks, counts, own);
        if (threadIdx.x == 0) words[t] = found.x, lens[t] = found.y;
        // Everybody has read the marks and counts.
        __syncthreads();
    }
}

__device__ __forceinline__ u64 sum_of_warp(u64 mine) {
    for (u32 step = 16; step > 0; step >>= 1) mine += __shfl_xor_sync(0xffffffffu, mine, step);
    return mine;
}

// Copies bytes by a warp, to any address.
__device__ __forceinline__ void copy_bytes(u8* to, const u8* from, u32 bytes) {
    u32 lane = threadIdx.x & 31, head = min((4u - (u32)(u64)to) & 3u, bytes), words = (bytes - head) / 4;
    if (lane < head) to[lane] = from[lane];
#pragma unroll 4
    for (u32 at = lane; at < words; at += 32) {
        const u8* four = from + head + 4 * at;
        *(u32*)(to + head + 4 * at) = four[0] | (u32)four[1] << 8 | (u32)four[2] << 16 | (u32)four[3] << 24;
    }
    u32 rest = head + 4 * words + lane;
    if (rest < bytes) to[rest] = from[rest];
}

// Brings the values of all tiles together, in their order. A block has consecutive tiles, a warp one at a time.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
gather_values(const DeltaJob* jobs, const u32* firsts, u32 count, u32 tiles, const u32* words, const u32* lens, u8* out) {
    __shared__ u64 shared[THREADS / 32];
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 begin = (u32)((u64)tiles * blockIdx.x / gridDim.x), end = (u32)((u64)tiles * (blockIdx.x + 1) / gridDim.x);
    u64 mine = 0;
#pragma unroll 8
    for (u32 t = threadIdx.x; t < begin; t += THREADS) mine += lens[t];
    mine = sum_of_warp(mine);
    if (lane == 0) shared[warp] = mine;
    __syncthreads();
    u64 base = 0;
    for (u32 i = 0; i < THREADS / 32; i++) base += shared[i];
    for (u32 t = begin + warp; t < end; t += THREADS / 32) {
        u32 len = lens[t];
        if (len == 0) continue;
        u64 before = 0;
        for (u32 at = begin + lane; at < t; at += 32) before += lens[at];
        before = base + sum_of_warp(before);
        Tile tile = find(firsts, count, t);
        const DeltaJob* job = jobs + tile.job;
        u64 from = (words[t] >> 30 == ALL ? job->now : job->place) + (u64)tile.index * job->tile;
        copy_bytes(out + before, (const u8*)from, len);
    }
}

// A word of a tile while units of it are exchanged.
struct Word {
    u8* at;
    u64 number;
    u64 was;
    u64 is;
    u32 bytes;          // less than 8 at the end of a weight
};

__device__ __forceinline__ Word word_of(const Piece& piece, u32 index) {
    Word word = {piece.old + 8 * index, piece.word + index, 0, 0, min(8u, piece.bytes - 8 * index)};
    word.is = word.was = load_word(word.at, word.bytes);
    return word;
}

// Gives a unit of a word its value. The old one goes to `undo`, if it is wanted.
template <u32 UNIT>
__device__ __forceinline__ void exchange(Word* word, u32 lane, const u8* value, u8* undo) {
    u32 shift = 8 * UNIT * lane;
    u64 ones = ~0ull >> (64 - 8 * UNIT), now = 0;
#pragma unroll
    for (u32 i = 0; i < UNIT; i++) {
        now |= (u64)value[i] << 8 * i;
        if (undo) undo[i] = (u8)(word->was >> (shift + 8 * i));
    }
    word->is = word->is & ~(ones << shift) | now << shift;
}

__device__ __forceinline__ u64 leave(const Word& word) {
    store_bytes(word.at, word.is, word.bytes);
    return product_at(word.number, word.is) - product_at(word.number, word.was);
}

// Applies the changes of a tile that are given by positions, by a warp. Returns the change of the digest's sum. Where positions are none,
// some units are not written.
template <u32 UNIT>
__device__ __forceinline__ u64 apply_positions(const Piece& piece, u32 count, const u8* places, u8* undo, u64* failed, u32 job) {
    constexpr u32 LANES = 8 / UNIT;
    u32 units = piece.bytes / UNIT;
    const u8* values = places + 2 * count;
    u8* values_undo = undo ? undo + 2 * count : 0;
    u64 sum = 0;
#pragma unroll 1
    for (u32 at = threadIdx.x & 31; at < count; at += 32) {
        u32 unit = position(places, at);
        if (undo) undo[2 * at] = (u8)unit, undo[2 * at + 1] = (u8)(unit >> 8);
        u32 before = at > 0 ? position(places, at - 1) : 0;
        if (unit >= units || (at > 0 && before >= unit)) {
            *failed = job + 1;
            continue;
        }
        // The first unit of a word brings the others.
        if (at > 0 && before / LANES == unit / LANES) continue;
        Word word = word_of(piece, unit / LANES);
        u32 next = at;
        do {
            u64 from = (u64)next * UNIT;
            exchange<UNIT>(&word, unit % LANES, values + from, undo ? values_undo + from : 0);
            next++;
            before = unit;
            unit = next < count ? position(places, next) : ~0u;
        } while (unit > before && unit < units && unit / LANES == before / LANES);
        sum += leave(word);
    }
    return sum;
}

// Applies the changes of a tile that are given by marks, or are all of its bytes, by a block.
template <u32 UNIT>
__device__ __forceinline__ u64 apply_to_tile(const Piece& piece, u32 head, const u8* places, u8* undo, u32* counts,
                                             u64* failed, u32 job) {
    constexpr u32 LANES = 8 / UNIT;
    u32 form = head >> 30, count = head & 0x3fffffffu, units = piece.bytes / UNIT;
    u64 sum = 0;
    if (form == ALL) {
#pragma unroll 1
        for (u32 at = threadIdx.x; 8 * at < piece.bytes; at += THREADS) {
            Word word = word_of(piece, at);
#pragma unroll 1
            for (u32 i = 0; i < word.bytes; i++) exchange<1>(&word, i, places + 8 * at + i, undo ? undo + 8 * at + i : 0);
            sum += leave(word);
        }
        return sum;
    }
    // A thread has the marks of EACH vectors.
    constexpr u32 OWN = EACH * 16 / UNIT / 8;
    u32 map = (units + 7) / 8, first = threadIdx.x * OWN, mine = 0;
#pragma unroll 1
    for (u32 at = first; at < min(first + OWN, map); at++) {
        u32 byte = places[at];
        if (undo) undo[at] = (u8)byte;
        if (8 * at + 8 > units && byte >> (units - 8 * at)) *failed = job + 1, byte &= (1u << (units - 8 * at)) - 1;
        mine += __popc(byte);
    }
    u32 all;
    u32 rank = sum_before(mine, counts, &all);
    if (all != count) {
        *failed = job + 1;
        return 0;
    }
    const u8* values = places + map;
    u8* values_undo = undo ? undo + map : 0;
#pragma unroll 1
    for (u32 at = first; at < min(first + OWN, map); at++) {
        u32 byte = places[at];
        if (8 * at + 8 > units) byte &= (1u << (units - 8 * at)) - 1;
        // Bits of a word of the digest are in one byte.
#pragma unroll 1
        for (u32 bits = 0; bits < 8; bits += LANES) {
            u32 left = byte >> bits & ((1u << LANES) - 1);
            if (left == 0) continue;
            Word word = word_of(piece, (8 * at + bits) / LANES);
            while (left != 0) {
                u64 from = (u64)rank * UNIT;
                exchange<UNIT>(&word, __ffs(left) - 1, values + from, undo ? values_undo + from : 0);
                left &= left - 1;
                rank++;
            }
            sum += leave(word);
        }
    }
    return sum;
}

// Applies changes to copies: `words` and `places` have the word of each tile, and where its values begin in `values`. Old values go to
// `undo`, if that is not 0, so that it becomes the values that take the changes back. `sums` gets the change of each job's sum, and `failed`
// gets the number of a job, plus 1, where places of units are not ascending, not in their tile, or not as many as values. Both are 0 before.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
apply_changes(const DeltaJob* jobs, const u32* firsts, u32 count, u32 tiles, const u32* words, const u64* places,
              const u8* values, u8* undo, u64* sums, u64* failed) {
    __shared__ u32 counts[THREADS / 32];
    // Few changes: a tile takes a warp little but the time in which its numbers come.
    u32 warps = gridDim.x * (THREADS / 32);
    for (u32 t = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5); t < tiles; t += warps) {
        u32 head = words[t];
        if (head >> 30 != POSITIONS) continue;
        Tile tile = find(firsts, count, t);
        const DeltaJob* job = jobs + tile.job;
        Piece piece = piece_of(job, tile.index);
        u32 found = head & 0x3fffffffu;
        const u8* from = values + places[t];
        u8* back = undo ? undo + places[t] : 0;
        u64 sum;
        if (job->unit == 1) sum = apply_positions<1>(piece, found, from, back, failed, tile.job);
        else if (job->unit == 2) sum = apply_positions<2>(piece, found, from, back, failed, tile.job);
        else if (job->unit == 4) sum = apply_positions<4>(piece, found, from, back, failed, tile.job);
        else sum = apply_positions<8>(piece, found, from, back, failed, tile.job);
        add_to(sums + tile.job, sum);
    }
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        u32 head = words[t], form = head >> 30;
        if (form == SAME || form == POSITIONS) continue;
        // Everybody has read what the last tile left in `counts`.
        __syncthreads();
        Tile tile = find(firsts, count, t);
        const DeltaJob* job = jobs + tile.job;
        Piece piece = piece_of(job, tile.index);
        const u8* from = values + places[t];
        u8* back = undo ? undo + places[t] : 0;
        u64 sum;
        if (job->unit == 1) sum = apply_to_tile<1>(piece, head, from, back, counts, failed, tile.job);
        else if (job->unit == 2) sum = apply_to_tile<2>(piece, head, from, back, counts, failed, tile.job);
        else if (job->unit == 4) sum = apply_to_tile<4>(piece, head, from, back, counts, failed, tile.job);
        else sum = apply_to_tile<8>(piece, head, from, back, counts, failed, tile.job);
        add_to(sums + tile.job, sum);
    }
}

// The digest's sum of each copy.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
sum_copies(const DeltaJob* jobs, const u32* firsts, u32 count, u32 tiles, u64* sums) {
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        Piece piece = piece_of(jobs + tile.job, tile.index);
        u64 first = piece.word + 2 * threadIdx.x, sum = 0;
        Keys even = keys_of(first), odd = keys_of(first + 1);
#pragma unroll 4
        for (u32 step = 0; step < EACH; step++) {
            u32 at = 16 * (threadIdx.x + step * THREADS);
            if (at >= piece.bytes) break;
            uint4 v = load_part(piece.old + at, piece.bytes - at);
            u32 row = (u32)(first >> 3) + step * (THREADS * 2 / 8);
            sum += product(even, row, v.x, v.y);
            if (piece.bytes - at > 8) sum += product(odd, row, v.z, v.w);
        }
        add_to(sums + tile.job, sum);
    }
}
