// Views whose elements do not follow one another, packed. Parameters: the size of an element in bytes, the number of dimensions, where
// the view begins in elements, and for each dimension, the innermost first, its side and its stride in elements.

template <typename Element>
__device__ __forceinline__ uint4 gather(const u8* source, u64 at, u32 bytes, const u64* parameters) {
    constexpr u32 SIZE = sizeof(Element), COUNT = 16 / SIZE;
    union { uint4 vector; Element elements[COUNT]; } out;
    out.vector = make_uint4(0, 0, 0, 0);
    u32 dimensions = (u32)parameters[1], count = (bytes + SIZE - 1) / SIZE;
    u64 first = at / SIZE;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (i >= count) break;
        u64 rest = first + i;
        u64 place = parameters[2];
        for (u32 d = 0; d < dimensions; d++) {
            u64 side = parameters[3 + 2 * d], next = rest / side;
            place += (rest - next * side) * parameters[4 + 2 * d];
            rest = next;
        }
        out.elements[i] = ((const Element*)source)[place];
    }
    return out.vector;
}

__device__ __forceinline__ uint4 encode16(const u8* source, u64 at, u32 bytes, const u64* parameters) {
    u64 size = parameters[0];
    if (size == 1) return gather<u8>(source, at, bytes, parameters);
    if (size == 2) return gather<u16>(source, at, bytes, parameters);
    if (size == 4) return gather<u32>(source, at, bytes, parameters);
    return gather<u64>(source, at, bytes, parameters);
}
