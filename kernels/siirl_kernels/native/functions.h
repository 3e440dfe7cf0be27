// What the parts of this library call of each other; `half` chooses bfloat16 instead of float32.
#pragma once

#include <cstdint>

namespace siirl {
struct bf16;
}

extern "C" {

void siirl_rms_norm(int half, const void* x, const void* w, void* out, int64_t rows, int64_t size, float eps);
void siirl_rope(int half, const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads,
                int64_t size);
void siirl_swiglu(int half, const void* gate, const void* up, void* out, int64_t count);
void siirl_packed_linear(int half, const void* x, const void* packed, const void* bias, const void* residual, void* out,
                         int64_t tokens, int64_t hidden, int64_t outputs);
void siirl_paged_attention(int half, const void* q, const void* k, const void* v, void* keys, void* values,
                           const int32_t* tables, const int32_t* lengths, const int32_t* starts, const int64_t* slots,
                           int64_t batch, int64_t blocks, int64_t block_size, int64_t heads, int64_t key_heads,
                           int64_t size, void* out);

// bfloat16 in tiles; hidden is a multiple of 32.
void siirl_tiles_pack(const siirl::bf16* w, siirl::bf16* packed, int64_t outputs, int64_t hidden);
void siirl_tiles_linear(const siirl::bf16* x, const siirl::bf16* packed, const siirl::bf16* bias,
                        const siirl::bf16* residual, siirl::bf16* out, int64_t tokens, int64_t hidden, int64_t outputs);
}
