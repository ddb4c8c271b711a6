// The launch of an encoding's own program, which is put in between `common.cuh` and this. It defines
//
//     __device__ uint4 encode16(const u8* source, u64 at, u32 bytes, const u64* parameters);
//
// which gives the bytes `at` .. `at + bytes` of the output, 16 of them or what there is at its end; `at` is a multiple of 16. What is
// behind them in the result means nothing. The launch writes them, and adds them to the digest.

// As `ProgramEntry` in src/table.rs.
struct ProgramJob {
    u64 source;         // device address of the first byte
    u64 target;         // device address, a multiple of 16
    u64 start;          // where the job begins in the output, a multiple of 16
    u64 bytes;          // of the output
    u64 parameters;     // the first of the job's among all
    u64 unused[3];
};

// `base` is where the bucket begins, 0 if no digest is wanted.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
encode(const ProgramJob* jobs, const u32* firsts, u32 count, u32 tiles, const u64* parameters, u64* total,
       u64 base) {
    u64 sum = 0;
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = find(firsts, count, t);
        const ProgramJob* job = jobs + tile.job;
        u64 start = (u64)tile.index * COPY_TILE;
        u32 bytes = (u32)min((u64)COPY_TILE, job->bytes - start);
        u8* target = (u8*)job->target + start;
        u64 word = (((u64)target - base) >> 3) + 2 * threadIdx.x;
        // Steps are whole rows apart; a pair of words never is in two.
        Keys even = keys_of(word), odd = keys_of(word + 1);
        for (u32 i = 0; i < COPY_STEPS; i++) {
            u32 at = (threadIdx.x + i * THREADS) * 16;
            if (at >= bytes) break;
            u32 here = min(16u, bytes - at);
            uint4 v = encode16((const u8*)job->source, job->start + start + at, here, parameters + job->parameters);
            if (here == 16) {
                __stcs((uint4*)(target + at), v);
            } else {
                u32 words[4] = {v.x, v.y, v.z, v.w};
                for (u32 n = 0; n < 4; n++) {
                    // The last word of the digest is filled up with zeros.
                    u32 left = here > 4 * n ? here - 4 * n : 0;
                    if (left < 4) words[n] &= (1u << (8 * left)) - 1u;
                    for (u32 b = 0; b < min(left, 4u); b++) target[at + 4 * n + b] = (u8)(words[n] >> (8 * b));
                }
                v = make_uint4(words[0], words[1], words[2], words[3]);
            }
            if (base != 0) {
                u32 row = (u32)(word >> 3) + i * (THREADS * 2 / 8);
                sum += product(even, row, v.x, v.y);
                if (here > 8) sum += product(odd, row, v.z, v.w);
            }
        }
    }
    add_to(total, sum);
}
