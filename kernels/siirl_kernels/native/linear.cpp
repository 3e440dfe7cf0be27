// x · weightᵀ of float32, [T, H] · [O, H]ᵀ = [T, O], and which of the two forms of a packed weight a call has.
//
// A packed weight is panels of as many outputs as a tile of results has columns; within a panel the outputs' numbers
// stand beside each other, number after number, so a step of the product reads whole registers, and memory in one
// stream. Each result is one chain of additions in the order of the numbers, whatever is computed beside it.
#include "functions.h"

#include <algorithm>
#include <vector>

#include "vec.h"

namespace siirl {
namespace {

#ifdef __AVX512F__
constexpr int ROWS = 8, WIDE = 3;  // 24 of 32 registers are sums
#else
constexpr int ROWS = 6, WIDE = 1;
#endif
constexpr int64_t PANEL = WIDE * LANES;
constexpr int64_t DEPTH = 192;  // numbers of a panel that stay in the first-level cache
constexpr int64_t TOKENS = 64;  // tokens whose numbers stay in the second-level cache
constexpr int64_t LINE = 64, AHEAD = 8;

struct Product {
    const float *x, *bias, *residual;
    float* out;
    int64_t tokens, hidden, outputs;
    bool streamed;  // the weight comes from memory
};

// Memory that the next block of the panel lies in, brought closer in equal parts by the tiles of this one.
struct Ahead {
    const char* at;
    int64_t lines;  // for every AHEAD steps
};

// N tokens by V registers of outputs, numbers `from` … `from + count`.
template <int N, int V>
void tile(const Product& p, const float* w, int64_t t, int64_t o, int64_t from, int64_t count, Ahead ahead) {
    float* out = p.out + t * p.outputs + o;
    int64_t width = p.outputs - o;
    vec acc[N][V];
    for (int r = 0; r < N; r++)
        for (int v = 0; v < V; v++) {
            const float* begun = from ? out + r * p.outputs : p.bias ? p.bias + o : nullptr;
            acc[r][v] = begun ? load_upto(begun + v * LANES, width - v * LANES) : vec{};
        }
    const float* x = p.x + t * p.hidden + from;
    for (int64_t k = 0; k < count; k++) {
        if (k % AHEAD == 0)
            for (int64_t i = 0; i < ahead.lines; i++, ahead.at += LINE) __builtin_prefetch(ahead.at, 0, 2);
        vec b[V];
        for (int v = 0; v < V; v++) b[v] = load(w + (k * V + v) * LANES);
        for (int r = 0; r < N; r++) {
            vec a = splat(x[r * p.hidden + k]);
            for (int v = 0; v < V; v++) acc[r][v] += a * b[v];
        }
    }
    bool last = from + count == p.hidden;
    for (int r = 0; r < N; r++)
        for (int v = 0; v < V; v++) {
            int64_t at = r * p.outputs + v * LANES, left = width - v * LANES;
            if (last && p.residual) acc[r][v] += load_upto(p.residual + t * p.outputs + o + at, left);
            store_upto(out + at, acc[r][v], left);
        }
}

template <int N, int V>
void tile_of(int64_t rows, const Product& p, const float* w, int64_t t, int64_t o, int64_t from, int64_t count,
             Ahead ahead) {
    if (rows >= N)
        tile<N, V>(p, w, t, o, from, count, ahead);
    else if constexpr (N > 1)
        tile_of<N - 1, V>(rows, p, w, t, o, from, count, ahead);
}

// Tokens `begin` … `end`, outputs `o` … `o + V · LANES`.
template <int V>
void panel(const Product& p, const float* packed, int64_t begin, int64_t end, int64_t o) {
    int64_t tiles = (end - begin + ROWS - 1) / ROWS;
    int64_t lines = p.streamed ? (AHEAD * V * LANES * int64_t(sizeof(float)) / LINE + tiles - 1) / tiles : 0;
    for (int64_t from = 0; from < p.hidden; from += DEPTH) {
        int64_t count = std::min(DEPTH, p.hidden - from);
        const float* w = packed + from * V * LANES;
        Ahead ahead{(const char*)(w + count * V * LANES), lines};
        for (int64_t t = begin; t < end; t += ROWS, ahead.at += lines * LINE * ((count + AHEAD - 1) / AHEAD))
            tile_of<ROWS, V>(end - t, p, w, t, o, from, count, ahead);
    }
}

template <int V = WIDE>
void panel_of(const Product& p, const float* packed, int64_t begin, int64_t end, int64_t o) {
    if (p.outputs - o > (V - 1) * LANES)
        panel<V>(p, packed, begin, end, o);
    else if constexpr (V > 1)
        panel_of<V - 1>(p, packed, begin, end, o);
}

// One panel of `width` outputs, its last register filled up with zeros.
void pack_panel(const float* w, float* packed, int64_t width, int64_t hidden) {
    int64_t registers = (width + LANES - 1) / LANES;
    for (int64_t v = 0; v < registers; v++)
        for (int64_t k = 0; k < hidden; k += LANES) {
            vec rows[LANES] = {};
            for (int64_t r = 0; r < std::min<int64_t>(LANES, width - v * LANES); r++)
                rows[r] = load_upto(w + (v * LANES + r) * hidden + k, hidden - k);
            transpose(rows);
            for (int64_t i = 0; i < std::min<int64_t>(LANES, hidden - k); i++)
                store(packed + ((k + i) * registers + v) * LANES, rows[i]);
        }
}

}  // namespace
}  // namespace siirl

using namespace siirl;

extern "C" {

// `packed` has room for the outputs, rounded up to whole registers, or in bfloat16 to 32, times hidden.
void siirl_pack(int half, const void* w, void* packed, int64_t outputs, int64_t hidden) {
    if (half) return siirl_tiles_pack((const bf16*)w, (bf16*)packed, outputs, hidden);
#pragma omp parallel for schedule(static) if (outputs * hidden > 262144)
    for (int64_t o = 0; o < outputs; o += PANEL)
        pack_panel((const float*)w + o * hidden, (float*)packed + o * hidden, std::min(PANEL, outputs - o), hidden);
}

// Adds a bias [O] and a residual [T, O] where they are given; a residual may not be `out` itself.
void siirl_packed_linear(int half, const void* x, const void* packed, const void* bias, const void* residual, void* out,
                         int64_t tokens, int64_t hidden, int64_t outputs) {
    if (half)
        return siirl_tiles_linear((const bf16*)x, (const bf16*)packed, (const bf16*)bias, (const bf16*)residual,
                                  (bf16*)out, tokens, hidden, outputs);
    Product p{(const float*)x, (const float*)bias, (const float*)residual, (float*)out, tokens, hidden, outputs, true};
#pragma omp parallel if (tokens * hidden * outputs > 262144)
    for (int64_t begin = 0; begin < tokens; begin += TOKENS)
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o += PANEL)
            panel_of(p, (const float*)packed + o * hidden, begin, std::min(tokens, begin + TOKENS), o);
}

// The same bits from a float32 weight as it is: each panel is packed, used and forgotten.
void siirl_linear(const float* x, const float* w, const float* bias, float* out, int64_t tokens, int64_t hidden,
                  int64_t outputs) {
    Product p{x, bias, nullptr, out, tokens, hidden, outputs, false};
#pragma omp parallel if (tokens * hidden * outputs > 262144)
    {
        std::vector<float> scratch(PANEL * hidden);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o += PANEL) {
            pack_panel(w + o * hidden, scratch.data(), std::min(PANEL, outputs - o), hidden);
            for (int64_t begin = 0; begin < tokens; begin += TOKENS)
                panel_of(p, scratch.data(), begin, std::min(tokens, begin + TOKENS), o);
        }
    }
}
}
