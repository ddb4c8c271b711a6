// F16 to the 8-bit float with five bits of exponent, which is its upper byte, rounded to nearest even. What is no number stays so.
__device__ __forceinline__ u32 code_of(u32 bits) {
    if ((bits & 0x7fffu) > 0x7c00u) return bits >> 8 | 0x02u;
    return (bits + 0x7fu + ((bits >> 8) & 1u)) >> 8;
}

__device__ __forceinline__ uint4 encode16(const u8* source, u64 at, u32 bytes, const u64*) {
    const u16* from = (const u16*)source + at;
    u32 out[4] = {0, 0, 0, 0};
    if (bytes == 16 && ((u64)from & 15) == 0) {
        uint4 low = load16(from), high = load16(from + 8);
        u32 pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 16; i++) {
            out[i / 4] |= code_of((pairs[i / 2] >> (16 * (i & 1))) & 0xffffu) << (8 * (i & 3));
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            if (i < bytes) out[i / 4] |= code_of(from[i]) << (8 * (i & 3));
        }
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}
