// A decoder layer's inference: norms, products, rotation, attention over a paged cache and activation, in one call.
//
// Shapes: T tokens, H hidden, N query heads, K key/value heads, D head size, I intermediate.
#include "functions.h"

#include <vector>

#include "vec.h"

using namespace siirl;

extern "C" {

struct Linear {
    const void *packed, *bias;
};

struct Layer {
    const void *input_norm, *post_norm, *q_norm, *k_norm;
    Linear q, k, v, o, gate, up, down;
    int64_t hidden, heads, key_heads, size, intermediate;
    float eps;
};

struct Paged {
    const int32_t *tables, *lengths, *starts;
    const int64_t* slots;
    int64_t batch, blocks, block_size;
};

void siirl_layer(int half, const Layer* layer, const void* x, const void* cos, const void* sin, void* keys,
                 void* values, const Paged* paged, void* out) {
    const Layer& l = *layer;
    int64_t tokens = paged->starts[paged->batch], bytes = half ? sizeof(bf16) : sizeof(float);
    int64_t queries = l.heads * l.size, shared = l.key_heads * l.size;
    static thread_local std::vector<char> memory;
    int64_t sizes[] = {l.hidden, queries, shared, shared, queries, l.hidden, l.intermediate, l.intermediate};
    int64_t total = 0;
    for (int64_t size : sizes) total += (tokens * size * bytes + 63) / 64 * 64;
    if (int64_t(memory.size()) < total + 64) memory.resize(total + 64);
    char* next = (char*)((uintptr_t(memory.data()) + 63) / 64 * 64);
    auto take = [&](int64_t size) {
        char* taken = next;
        next += (tokens * size * bytes + 63) / 64 * 64;
        return taken;
    };
    char *normed = take(l.hidden), *q = take(queries), *k = take(shared), *v = take(shared), *mixed = take(queries),
         *stream = take(l.hidden), *gate = take(l.intermediate), *up = take(l.intermediate);
    auto linear = [&](const void* from, const Linear& to, const void* residual, void* into, int64_t in, int64_t size) {
        siirl_packed_linear(half, from, to.packed, to.bias, residual, into, tokens, in, size);
    };
    siirl_rms_norm(half, x, l.input_norm, normed, tokens, l.hidden, l.eps);
    linear(normed, l.q, nullptr, q, l.hidden, queries);
    linear(normed, l.k, nullptr, k, l.hidden, shared);
    linear(normed, l.v, nullptr, v, l.hidden, shared);
    if (l.q_norm) siirl_rms_norm(half, q, l.q_norm, q, tokens * l.heads, l.size, l.eps);
    if (l.k_norm) siirl_rms_norm(half, k, l.k_norm, k, tokens * l.key_heads, l.size, l.eps);
    siirl_rope(half, q, cos, sin, q, tokens, l.heads, l.size);
    siirl_rope(half, k, cos, sin, k, tokens, l.key_heads, l.size);
    siirl_paged_attention(half, q, k, v, keys, values, paged->tables, paged->lengths, paged->starts, paged->slots,
                          paged->batch, paged->blocks, paged->block_size, l.heads, l.key_heads, l.size, mixed);
    linear(mixed, l.o, x, stream, queries, l.hidden);
    siirl_rms_norm(half, stream, l.post_norm, normed, tokens, l.hidden, l.eps);
    linear(normed, l.gate, nullptr, gate, l.hidden, l.intermediate);
    linear(normed, l.up, nullptr, up, l.hidden, l.intermediate);
    siirl_swiglu(half, gate, up, gate, tokens * l.intermediate);
    linear(gate, l.down, stream, out, l.intermediate, l.hidden);
}
}
