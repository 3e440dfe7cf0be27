// Norm, rotation and activation, and their gradients: one pass over memory each.
#include "functions.h"

#include <algorithm>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

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
float scale_of(const E* row, int64_t size, float eps) {
    vec squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        vec v = load_upto(row + i, size - i);
        squares += v * v;
    }
    return 1.0f / std::sqrt(sum(squares) / float(size) + eps);
}

template <class E>
void rms_norm(const E* x, const E* weight, E* out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > 32768)
    for (int64_t r = 0; r < rows; r++) {
        const E* row = x + r * size;
        float factor = scale_of(row, size, eps);
        for (int64_t i = 0; i < size; i += LANES) {
            vec v = rounded(load_upto(row + i, size - i) * factor, E{});
            store_upto(out + r * size + i, v * load_upto(weight + i, size - i), size - i);
        }
    }
}

// The weight's gradient is summed over blocks of rows in float32 and over blocks in float64, thread after thread.
constexpr int64_t ROWS = 64;

template <class E>
struct NormGradient {
    const E *x, *weight, *grad;
    E* grad_x;
    int64_t rows, size;
    float eps;

    void row(int64_t r, float* block) const {
        const E *from = x + r * size, *g = grad + r * size;
        float factor = scale_of(from, size, eps);
        vec dot = {};
        for (int64_t i = 0; i < size; i += LANES) {
            int64_t n = size - i;
            vec normed = load_upto(from + i, n) * factor, gradient = load_upto(g + i, n);
            dot += gradient * load_upto(weight + i, n) * normed;
            store(block + i, load(block + i) + gradient * rounded(normed, E{}));
        }
        float mean = sum(dot) / float(size);
        for (int64_t i = 0; i < size; i += LANES) {
            int64_t n = size - i;
            vec normed = load_upto(from + i, n) * factor;
            store_upto(grad_x + r * size + i, (load_upto(g + i, n) * load_upto(weight + i, n) - normed * mean) * factor, n);
        }
    }

    // Blocks number `first`, `first + step`, …
    void blocks(int64_t first, int64_t step, double* total) const {
        std::vector<float> block((size + LANES - 1) / LANES * LANES);
        for (int64_t from = first * ROWS; from < rows; from += step * ROWS) {
            std::fill(block.begin(), block.end(), 0.0f);
            for (int64_t r = from; r < std::min(rows, from + ROWS); r++) row(r, block.data());
            for (int64_t i = 0; i < size; i++) total[i] += block[i];
        }
    }

    void run(E* grad_weight) const {
        std::vector<double> totals(size);
#pragma omp parallel if (rows * size > 32768)
        {
            int64_t thread = 0, threads = 1;
#ifdef _OPENMP
            thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
            std::vector<double> own(size);
            blocks(thread, threads, own.data());
#pragma omp for ordered schedule(static, 1)
            for (int64_t t = 0; t < threads; t++) {
#pragma omp ordered
                for (int64_t i = 0; i < size; i++) totals[i] += own[i];
            }
        }
        for (int64_t i = 0; i < size; i += LANES) {
            vec v;
            for (int64_t l = 0; l < LANES; l++) v[l] = i + l < size ? float(totals[i + l]) : 0.0f;
            store_upto(grad_weight + i, v, size - i);
        }
    }
};

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
void rope_gradient(const E* grad, const E* cos, const E* sin, E* out, int64_t tokens, int64_t heads, int64_t size) {
    int64_t half = size / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * size > 32768)
    for (int64_t t = 0; t < tokens; t++) {
        const E *c = cos + t * size, *s = sin + t * size;
        for (int64_t h = 0; h < heads; h++) {
            const E* from = grad + (t * heads + h) * size;
            E* to = out + (t * heads + h) * size;
            for (int64_t i = 0; i < half; i += LANES) {
                int64_t n = half - i;
                vec first = load_upto(from + i, n), second = load_upto(from + half + i, n);
                vec near = first * load_upto(c + i, n), far = second * load_upto(c + half + i, n);
                store_upto(to + i, near + second * load_upto(s + half + i, n), n);
                store_upto(to + half + i, far - first * load_upto(s + i, n), n);
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

// With s = σ(gate): ∂/∂gate = s (1 + gate (1 - s)) up, ∂/∂up = gate s.
template <class E>
void swiglu_gradient(const E* gate, const E* up, const E* grad, E* grad_gate, E* grad_up, int64_t count) {
    const int64_t piece = 1024;
#pragma omp parallel for schedule(static) if (count > 32768)
    for (int64_t from = 0; from < count; from += piece)
        for (int64_t i = from; i < from + piece && i < count; i += LANES) {
            int64_t n = count - i;
            vec x = load_upto(gate + i, n), gradient = load_upto(grad + i, n);
            vec s = 1.0f / (1.0f + exp(-x));
            store_upto(grad_gate + i, gradient * load_upto(up + i, n) * (s * (1.0f + x * (1.0f - s))), n);
            store_upto(grad_up + i, gradient * rounded(x * s, E{}), n);
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

void siirl_rms_norm_gradient(int half, const void* x, const void* w, const void* grad, void* grad_x, void* grad_w,
                             int64_t rows, int64_t size, float eps) {
    if (half)
        NormGradient<bf16>{(const bf16*)x, (const bf16*)w, (const bf16*)grad, (bf16*)grad_x, rows, size, eps}.run(
            (bf16*)grad_w);
    else
        NormGradient<float>{(const float*)x, (const float*)w, (const float*)grad, (float*)grad_x, rows, size, eps}.run(
            (float*)grad_w);
}

void siirl_rope_gradient(int half, const void* grad, const void* cos, const void* sin, void* out, int64_t tokens,
                         int64_t heads, int64_t size) {
    if (half)
        rope_gradient((const bf16*)grad, (const bf16*)cos, (const bf16*)sin, (bf16*)out, tokens, heads, size);
    else
        rope_gradient((const float*)grad, (const float*)cos, (const float*)sin, (float*)out, tokens, heads, size);
}

void siirl_swiglu_gradient(int half, const void* gate, const void* up, const void* grad, void* grad_gate, void* grad_up,
                           int64_t count) {
    if (half)
        swiglu_gradient((const bf16*)gate, (const bf16*)up, (const bf16*)grad, (bf16*)grad_gate, (bf16*)grad_up, count);
    else
        swiglu_gradient((const float*)gate, (const float*)up, (const float*)grad, (float*)grad_gate, (float*)grad_up,
                        count);
}
}
