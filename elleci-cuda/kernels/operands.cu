// Operands of the large products as matmul.cu and cuBLASLt take them, and what is left to do with cuBLASLt's results.
//
// Rows are padded with zeros to `pitch` elements, a multiple of 64.
#include "platform.cuh"

// bf16 [rows, pitch] of a matrix [rows, width]: gradients and activations, or weights. A block a row.
KERNEL(256, to_halves)(Floats x, int width, int pitch, u16* out) {
    const i64 from = (i64)blockIdx.x * width;
    u16* row = out + (i64)blockIdx.x * pitch;
    if (!x.is_bf16 && width % 4 == 0) {
        const Four* four = (const Four*)((const float*)x.data + from);
        for (int i = threadIdx.x; i < pitch / 4; i += blockDim.x) {
            u32 low = 0, high = 0;
            if (4 * i < width) {
                const Four v = four[i];
                low = bf16_pair(bits_float(v.v[0]), bits_float(v.v[1]));
                high = bf16_pair(bits_float(v.v[2]), bits_float(v.v[3]));
            }
            ((u64*)row)[i] = (u64)high << 32 | low;
        }
        return;
    }
    for (int i = threadIdx.x; i < pitch; i += blockDim.x) {
        row[i] = i < width ? to_bf16(read(x, from + i)) : 0;
    }
}

// bf16 [rows, pitch] of quantised rows, codes [rows, pitch] times the scale of the row. Four codes a thread.
KERNEL(256, codes_to_halves)(const s8* codes, const float* scales, int rows, int pitch, u16* out) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (i64)rows * (pitch / 4)) {
        const u32 four = ((const u32*)codes)[i];
        const float scale = scales[i / (pitch / 4)];
        const auto value = [&](int e) { return (float)(s8)(four >> (8 * e)) * scale; };
        ((u64*)out)[i] = (u64)bf16_pair(value(2), value(3)) << 32 | bf16_pair(value(0), value(1));
    }
}

// Ternary codes, four to a byte, as bf16. Sixteen a thread.
KERNEL(256, ternary_to_halves)(const u8* packed, int words, u16* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < words) {
        const u32 codes = ((const u32*)packed)[i];
        for (int q = 0; q < 2; q++) {
            Four four;
            for (int e = 0; e < 4; e++) {
                // Each code is 0, 1 or 3: 1.0 is 0x3f80, and the higher bit is the sign.
                const u32 pair = codes >> (16 * q + 4 * e);
                four.v[e] = (pair & 1u) * 0x3f80u | (pair & 2u) << 14 | (pair >> 2 & 1u) * 0x3f800000u | (pair & 8u) << 28;
            }
            ((Four*)out)[2 * (i64)i + q] = four;
        }
    }
}

// And as int8.
KERNEL(256, ternary_to_bytes)(const u8* packed, int words, s8* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < words) {
        const u32 codes = ((const u32*)packed)[i];
        Four four;
        for (int e = 0; e < 4; e++) {
            // Four codes of two bits to four bytes, each extended by its sign: 3 -> 0xff.
            const u32 c = codes >> (8 * e);
            const u32 spread = (c & 3u) | (c & 0xcu) << 6 | (c & 0x30u) << 12 | (c & 0xc0u) << 18;
            four.v[e] = spread | (spread >> 1 & 0x01010101u) * 0xfcu;
        }
        ((Four*)out)[i] = four;
    }
}

// And turned, as e4m3: out [in, pitch] of a matrix [rows, in] whose rows take `row_bytes`. blockIdx: (64 rows, 64 columns).
KERNEL(256, ternary_to_e4m3_turned)(const u8* packed, int rows, int in, int row_bytes, int pitch, u8* out) {
    const int LD = 64 + 16;
    u8* tile = shared_memory(); // [column][row]
    const int row0 = blockIdx.x * 64, col0 = blockIdx.y * 64, r = threadIdx.x / 4, c = threadIdx.x % 4 * 16;
    const u32 codes = row0 + r < rows ? *(const u32*)(packed + (i64)(row0 + r) * row_bytes + (col0 + c) / 4) : 0;
    for (int e = 0; e < 16; e++) {
        const u32 code = codes >> (2 * e);
        tile[(c + e) * LD + r] = (u8)((code & 1u) * 0x38u | (code & 2u) << 6);
    }
    BARRIER();
    if (col0 + r < in) {
        *(Four*)(out + (i64)(col0 + r) * pitch + row0 + c) = *(const Four*)(tile + r * LD + c);
    }
}

// Rows as e4m3 with a scale each: the largest magnitude of a row becomes 448. out [rows, pitch]. A block a row.
KERNEL(256, to_e4m3_rows)(const float* x, int width, int pitch, u8* out, float* scales) {
    const float* row = x + (i64)blockIdx.x * width;
    float largest = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        largest = Max::of(fabsf(row[i]), largest);
    }
    largest = block_reduce<Max>(largest, (float*)shared_memory());
    // A row of zeros has zeros for codes, whatever its scale; the smallest floats have no reciprocal.
    const float amax = largest < 1e-30f ? 1e-30f : largest, up = 448.0f / amax;
    for (int i = threadIdx.x; i < pitch / 4; i += blockDim.x) {
        u32 four = 0;
        for (int e = 0; e < 4; e++) {
            four |= 4 * i + e < width ? (u32)to_e4m3(row[4 * i + e] * up) << (8 * e) : 0;
        }
        ((u32*)(out + (i64)blockIdx.x * pitch))[i] = four;
    }
    if (threadIdx.x == 0) {
        scales[blockIdx.x] = amax / 448.0f;
    }
}

// y [rows, width] = sums · (γ · scale of the row), plus `addend` where `add`. Integer sums, which may lie where y does. A block a row.
KERNEL(256, scale_sums)(const int* sums, int width, const float* scales, const float* gamma, Floats addend, int add, Floats y) {
    const float scale = *gamma * scales[blockIdx.x];
    const i64 from = (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float v = (float)sums[from + i] * scale;
        write(y, from + i, add ? read(addend, from + i) + v : v);
    }
}

// dx [rows, width] (=|+=) product · (γ · scale of the row). The product may lie where dx does, where nothing is added.
KERNEL(256, scale_rows)(const float* product, int width, const float* scales, const float* gamma, float* dx, int add) {
    const float scale = *gamma * scales[blockIdx.x];
    const i64 from = (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float v = product[from + i] * scale;
        dx[from + i] = add ? dx[from + i] + v : v;
    }
}
