// What FP8 blocks are, for kernels of devices: types of elements, formulas and codes. The numbers are those of `src/device.rs`.
// The types `u8` to `u64` are declared in front of it.

enum { BF16 = 1, F16 = 2, F32 = 3 };
enum { TRITON = 0, PYTORCH = 1, UE8M0 = 2, TRITON_GPU = 3 };

// To nearest even; NaN stays NaN.
__device__ __forceinline__ float round_to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return value;
    return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// Two values, rounded to BF16, the first in the lower half.
__device__ __forceinline__ u32 rounded_pair(float a, float b) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}

struct Scale {
    float scale;
    float multiplier;
    u32 bits;           // of the scale
};

// The formulas of `Mode::block_scale`, in the same correctly rounded arithmetic.
__device__ __forceinline__ Scale block_scale(u32 mode, float absmax) {
    Scale s;
    if (mode == PYTORCH) {
        s.multiplier = absmax == 0.0f ? 1.0f : __fdiv_rn(448.0f, absmax);
        s.scale = __fdiv_rn(1.0f, s.multiplier);
    } else if (mode == TRITON_GPU) {
        // What Triton's `/` compiles to: a product with a rounded reciprocal, and an approximate one.
        s.scale = __fmul_rn(fmaxf(absmax, 1e-10f), __fdiv_rn(1.0f, 448.0f));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s.multiplier) : "f"(s.scale));
    } else {
        float floor = mode == UE8M0 ? 1e-4f : 1e-10f;
        s.scale = __fdiv_rn(fmaxf(absmax, floor), 448.0f);
        if (mode == UE8M0) {
            u32 mantissa = (1u << 23) - 1u;
            s.scale = __uint_as_float((__float_as_uint(s.scale) + mantissa) & ~mantissa);
        }
        s.multiplier = __fdiv_rn(1.0f, s.scale);
    }
    return s;
}

// Two codes; the first in the lower byte. Values are finite.
__device__ __forceinline__ u32 codes2(float a, float b) {
#if __CUDA_ARCH__ >= 890
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(b), "f"(a));
    return codes;
#else
    u32 result = 0;
    float values[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        u32 bits = __float_as_uint(values[i]);
        u32 magnitude = min(bits & 0x7fffffffu, __float_as_uint(448.0f));
        u32 code;
        if (magnitude >= 121u << 23) {
            code = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
        } else {
            // Subnormal codes are multiples of 2^-9, the distance of floats around 2^14.
            code = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f))
                 - __float_as_uint(16384.0f);
        }
        result |= (code | ((bits >> 24) & 0x80u)) << (8 * i);
    }
    return result;
#endif
}
