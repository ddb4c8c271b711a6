// Casts between floating-point types. Parameters: the type of the source, and that of the output.

enum { BF16 = 0, F16 = 1, F32 = 2, F64 = 3 };

template <int TYPE> struct SizeOf { enum { value = TYPE == F64 ? 8 : TYPE == F32 ? 4 : 2 }; };

// What is no number keeps the upper bits of its fraction that fit, and gets the first of them set: as on the host.
__device__ __forceinline__ u32 f32_of_bf16(u32 bits) {
    return ((bits & 0x7fffu) > 0x7f80u ? bits | 0x40u : bits) << 16;
}

__device__ __forceinline__ u32 f32_of_f16(u32 bits) {
    if ((bits & 0x7fffu) > 0x7c00u) return (bits & 0x8000u) << 16 | 0x7fc00000u | (bits & 0x3ffu) << 13;
    return __float_as_uint(f16_value(bits));
}

__device__ __forceinline__ u32 f32_of_f64(u64 bits) {
    if ((bits & 0x7fffffffffffffffull) > 0x7ff0000000000000ull) {
        return (u32)(bits >> 32) & 0x80000000u | 0x7fc00000u | (u32)(bits >> 29) & 0x7fffffu;
    }
    return __float_as_uint(__double2float_rn(__longlong_as_double(bits)));
}

__device__ __forceinline__ bool is_nan(u32 bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

__device__ __forceinline__ u32 bf16_of_f32(u32 bits) {
    if (is_nan(bits)) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ u32 f16_of_f32(u32 bits) {
    if (is_nan(bits)) return (bits >> 16) & 0x8000u | 0x7e00u | (bits >> 13) & 0x3ffu;
    u32 half;
    asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h; }" : "=r"(half) : "f"(__uint_as_float(bits)));
    return half;
}

__device__ __forceinline__ u64 f64_of_f32(u32 bits) {
    if (is_nan(bits)) {
        return (u64)(bits & 0x80000000u) << 32 | 0x7ff8000000000000ull | (u64)(bits & 0x7fffffu) << 29;
    }
    return (u64)__double_as_longlong((double)__uint_as_float(bits));
}

template <int FROM>
__device__ __forceinline__ u32 f32_of(u64 bits) {
    if (FROM == BF16) return f32_of_bf16((u32)bits);
    if (FROM == F16) return f32_of_f16((u32)bits);
    if (FROM == F64) return f32_of_f64(bits);
    return (u32)bits;
}

template <int FROM>
__device__ __forceinline__ u64 element(const u8* source, u64 index) {
    if (FROM == F64) return ((const u64*)source)[index];
    if (FROM == F32) return ((const u32*)source)[index];
    return ((const u16*)source)[index];
}

// The host's rounding from F64 to types of 16 bits is not here: those pairs have no kernel.
template <int FROM, int TO>
__device__ __forceinline__ uint4 cast(const u8* source, u64 at, u32 bytes) {
    constexpr u32 READ = SizeOf<FROM>::value, WRITE = SizeOf<TO>::value, COUNT = 16 / WRITE;
    constexpr u32 WORDS = COUNT * READ / 4;
    u64 first = at / WRITE;
    u64 elements[COUNT];
    const u8* from = source + first * READ;
    if (bytes == 16 && ((u64)from & 15) == 0 && WORDS % 4 == 0) {
        u32 words[WORDS];
#pragma unroll
        for (u32 v = 0; 4 * v + 3 < WORDS; v++) {
            uint4 d = load16(from + 16 * v);
            words[4 * v] = d.x, words[4 * v + 1] = d.y, words[4 * v + 2] = d.z, words[4 * v + 3] = d.w;
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            if (READ == 8) elements[i] = (u64)words[(2 * i + 1) % WORDS] << 32 | words[2 * i % WORDS];
            if (READ == 4) elements[i] = words[i % WORDS];
            if (READ == 2) elements[i] = (words[i / 2] >> (16 * (i & 1))) & 0xffffu;
        }
    } else {
        u32 count = (bytes + WRITE - 1) / WRITE;
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) elements[i] = i < count ? element<FROM>(source, first + i) : 0;
    }
    u32 out[4] = {0, 0, 0, 0};
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        u32 value = f32_of<FROM>(elements[i]);
        if (TO == BF16) out[i / 2] |= bf16_of_f32(value) << (16 * (i & 1));
        if (TO == F16) out[i / 2] |= f16_of_f32(value) << (16 * (i & 1));
        if (TO == F32) out[i % 4] = value;
        if (TO == F64) {
            u64 wide = f64_of_f32(value);
            out[2 * i % 4] = (u32)wide, out[(2 * i + 1) % 4] = (u32)(wide >> 32);
        }
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

template <int FROM>
__device__ __forceinline__ uint4 cast_to(u64 to, const u8* source, u64 at, u32 bytes) {
    if (to == BF16) return cast<FROM, BF16>(source, at, bytes);
    if (to == F16) return cast<FROM, F16>(source, at, bytes);
    if (to == F64) return cast<FROM, F64>(source, at, bytes);
    return cast<FROM, F32>(source, at, bytes);
}

__device__ __forceinline__ uint4 encode16(const u8* source, u64 at, u32 bytes, const u64* parameters) {
    u64 from = parameters[0], to = parameters[1];
    if (from == BF16) return cast_to<BF16>(to, source, at, bytes);
    if (from == F16) return cast_to<F16>(to, source, at, bytes);
    if (from == F64) return cast<F64, F32>(source, at, bytes);
    return cast_to<F32>(to, source, at, bytes);
}
