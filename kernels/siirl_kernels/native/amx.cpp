// x · weightᵀ of bfloat16 in AMX tiles: x's rows are tiles as they lie, the weight is packed into tiles beforehand.
//
// A panel is 32 outputs: for every 32 numbers two tiles of 16 outputs, one stream of memory. Without AMX
// `siirl_has_tiles` says so and nothing else is called.
#include "functions.h"

#include <algorithm>
#include <vector>

#include "vec.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define SIIRL_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace siirl {
namespace {

#ifdef SIIRL_TILES

constexpr int64_t SIDE = 16, DEPTH = 32;  // outputs and tokens of a tile; numbers of a row in one
constexpr int64_t TILE = SIDE * DEPTH, PANEL = 2 * SIDE;
constexpr int64_t TOKENS = 64;                          // whose numbers stay in the second-level cache
constexpr int64_t AHEAD = 16384;  // bytes between what is read and what comes closer
constexpr int64_t LINES = 2 * TILE * sizeof(bf16) / 64;  // of memory, in a step of DEPTH numbers

struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
};

void configure() {
    alignas(64) Config config;
    for (int i = 0; i < 8; i++) config.columns[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

struct Product {
    const bf16 *x, *bias, *residual;
    bf16* out;
    int64_t tokens, hidden, outputs;
    const bf16* tail;  // the last tokens, filled up to SIDE, where they are fewer
};

const bf16* rows(const Product& p, int64_t t) { return p.tail && p.tokens - t < SIDE ? p.tail : p.x + t * p.hidden; }

// 16 tokens by 16 outputs.
void keep(const Product& p, const float* tile, int64_t t, int64_t o) {
    int64_t width = p.outputs - o;
    vec bias = p.bias ? load_upto(p.bias + o, width) : vec{};
    for (int64_t r = 0; r < std::min(SIDE, p.tokens - t); r++, tile += SIDE) {
        bf16* out = p.out + (t + r) * p.outputs + o;
        store_upto(out, load(tile) + bias, width);
        if (p.residual) store_upto(out, load_upto(out, width) + load_upto(p.residual + (out - p.out), width), width);
    }
}

// 16 · B tokens by a panel; memory from `ahead` on comes closer, `lines` for every step.
template <int B>
void block(const Product& p, const bf16* w, int64_t t, int64_t o, const char* ahead, int64_t lines) {
    const bf16 *first = rows(p, t), *second = B == 2 ? rows(p, t + SIDE) : nullptr;
    _tile_zero(0);
    _tile_zero(1);
    if (B == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < p.hidden; i += DEPTH, w += 2 * TILE) {
        for (int64_t line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        _tile_loadd(4, w, 64);
        _tile_loadd(5, w + TILE, 64);
        _tile_loadd(6, first + i, p.hidden * 2);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 6, 5);
        if (B == 2) {
            _tile_loadd(7, second + i, p.hidden * 2);
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    alignas(64) float found[4][SIDE * SIDE];
    _tile_stored(0, found[0], 64);
    _tile_stored(1, found[1], 64);
    if (B == 2) {
        _tile_stored(2, found[2], 64);
        _tile_stored(3, found[3], 64);
    }
    for (int b = 0; b < B; b++) {
        keep(p, found[2 * b], t + b * SIDE, o);
        if (o + SIDE < p.outputs) keep(p, found[2 * b + 1], t + b * SIDE, o + SIDE);
    }
}

// Tokens `begin` … `end`, outputs `o` … `o + PANEL`.
void panel(const Product& p, const bf16* packed, int64_t begin, int64_t end, int64_t o) {
    int64_t blocks = (end - begin + 2 * SIDE - 1) / (2 * SIDE), lines = (LINES + blocks - 1) / blocks;
    const char* ahead = (const char*)packed + AHEAD;
    for (int64_t t = begin; t < end; t += 2 * SIDE, ahead += lines * 64 * (p.hidden / DEPTH))
        if (end - t > SIDE)
            block<2>(p, packed, t, o, ahead, lines);
        else
            block<1>(p, packed, t, o, ahead, lines);
}

#endif

}  // namespace
}  // namespace siirl

using namespace siirl;

extern "C" {

// Whether this process may use tiles; Linux gives their state to those who ask.
int siirl_has_tiles() {
#ifdef SIIRL_TILES
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 0;
#endif
}

// A row of a tile holds the numbers 2i and 2i + 1 of each of 16 outputs; outputs that are not there are zero.
void siirl_tiles_pack(const bf16* w, bf16* packed, int64_t outputs, int64_t hidden) {
#ifdef SIIRL_TILES
#pragma omp parallel for schedule(static) if (outputs * hidden > 262144)
    for (int64_t o = 0; o < outputs; o += PANEL)
        for (int64_t k = 0; k < hidden; k += DEPTH)
            for (int64_t side = 0; side < 2; side++) {
                int64_t first = o + side * SIDE;
                vec rows[LANES] = {};
                for (int64_t r = 0; r < std::min(SIDE, outputs - first); r++)
                    std::memcpy(&rows[r], w + (first + r) * hidden + k, sizeof(vec));
                transpose(rows);
                std::memcpy(packed + o * hidden + (k / DEPTH * 2 + side) * TILE, rows, sizeof rows);
            }
#endif
}

void siirl_tiles_linear(const bf16* x, const bf16* packed, const bf16* bias, const bf16* residual, bf16* out,
                        int64_t tokens, int64_t hidden, int64_t outputs) {
#ifdef SIIRL_TILES
    static thread_local std::vector<bf16> tail;
    Product p{x, bias, residual, out, tokens, hidden, outputs, nullptr};
    if (int64_t count = tokens % SIDE) {
        tail.assign(SIDE * hidden, bf16{0});
        std::copy(x + (tokens - count) * hidden, x + tokens * hidden, tail.data());
        p.tail = tail.data();
    }
#pragma omp parallel if (tokens * hidden * outputs > 262144)
    {
        configure();
        for (int64_t begin = 0; begin < tokens; begin += TOKENS)
#pragma omp for schedule(static)
            for (int64_t o = 0; o < outputs; o += PANEL)
                panel(p, packed + o * hidden, begin, std::min(tokens, begin + TOKENS), o);
        _tile_release();
    }
#endif
}
}
