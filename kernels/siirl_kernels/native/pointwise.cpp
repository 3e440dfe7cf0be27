// Norm, rotation and activation of few rows, where a call of several passes costs more than the work.
#include "functions.h"
#include "vec.h"

namespace siirl {
namespace {

inline vec rounded(vec x, float) { return x; }
inline vec rounded(vec x, bf16) {
    bf16 stored[LANES];
    store(stored, x);
    return load(stored);
}

template <class E>
void rms_norm(const E* x, const E* weight, E* out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++) {
        const E* row = x + r * size;
        vec squares = {};
        for (int64_t i = 0; i < size; i += LANES) {
            vec v = load_upto(row + i, size - i);
            squares += v * v;
        }
        float factor = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
        for (int64_t i = 0; i < size; i += LANES) {
            vec v = rounded(load_upto(row + i, size - i) * factor, E{});
            store_upto(out + r * size + i, v * load_upto(weight + i, size - i), size - i);
        }
    }
}

// Pairs are (i, i + D/2); cos and sin hold one row per token.
template <class E>
void rope(const E* x, const E* cos, const E* sin, E* out, int64_t tokens, int64_t heads, int64_t size) {
    int64_t half = size / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * size > 32768)
    for (int64_t t = 0; t < tokens; t++) {
        const E *c = cos + t * size, *s = sin + t * size;
        for (int64_t h = 0; h < heads; h++) {
            const E* from = x + (t * heads + h) * size;
            E* to = out + (t * heads + h) * size;
            for (int64_t i = 0; i < half; i += LANES) {
                int64_t n = half - i;
                vec first = load_upto(from + i, n), second = load_upto(from + half + i, n);
                vec near = first * load_upto(c + i, n), far = second * load_upto(c + half + i, n);
                store_upto(to + i, near - second * load_upto(s + i, n), n);
                store_upto(to + half + i, far + first * load_upto(s + half + i, n), n);
            }
        }
    }
}

template <class E>
void swiglu(const E* gate, const E* up, E* out, int64_t count) {
    const int64_t piece = 1024;
#pragma omp parallel for schedule(static) if (count > 32768)
    for (int64_t from = 0; from < count; from += piece)
        for (int64_t i = from; i < from + piece && i < count; i += LANES) {
            int64_t n = count - i;
            vec g = load_upto(gate + i, n);
            vec activated = rounded(g / (1.0f + exp(-g)), E{});
            store_upto(out + i, activated * load_upto(up + i, n), n);
        }
}

}  // namespace
}  // namespace siirl

using namespace siirl;

extern "C" {

void siirl_rms_norm(int half, const void* x, const void* w, void* out, int64_t rows, int64_t size, float eps) {
    if (half)
        rms_norm((const bf16*)x, (const bf16*)w, (bf16*)out, rows, size, eps);
    else
        rms_norm((const float*)x, (const float*)w, (float*)out, rows, size, eps);
}

void siirl_rope(int half, const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads,
                int64_t size) {
    if (half)
        rope((const bf16*)x, (const bf16*)cos, (const bf16*)sin, (bf16*)out, tokens, heads, size);
    else
        rope((const float*)x, (const float*)cos, (const float*)sin, (float*)out, tokens, heads, size);
}

void siirl_swiglu(int half, const void* gate, const void* up, void* out, int64_t count) {
    if (half)
        swiglu((const bf16*)gate, (const bf16*)up, (bf16*)out, count);
    else
        swiglu((const float*)gate, (const float*)up, (float*)out, count);
}
}
