// x · weightᵀ of bfloat16 in AMX tiles: the weight's rows are tiles as they lie, only the few rows of x are rearranged.
//
// A tile of the result is 16 outputs by 16 tokens. Without AMX `siirl_has_tiles` says so and nothing else is called.
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
constexpr int64_t PACKED = SIDE * DEPTH;

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

// x as tiles whose row p holds the numbers 2p and 2p + 1 of each of 16 tokens; missing tokens are zero.
void pack(const bf16* x, int64_t tokens, int64_t hidden, bf16* packed) {
    for (int64_t t = 0; t < tokens; t += SIDE)
        for (int64_t i = 0; i < hidden; i += DEPTH, packed += PACKED) {
            vec rows[LANES] = {};
            for (int64_t r = 0; r < std::min(SIDE, tokens - t); r++)
                std::memcpy(&rows[r], x + (t + r) * hidden + i, sizeof(vec));
            transpose(rows);
            std::memcpy(packed, rows, sizeof rows);
        }
}

void keep(const float* tile, const bf16* bias, bf16* out, int64_t outputs, int64_t tokens) {
    vec rows[LANES];
    std::memcpy(rows, tile, sizeof rows);
    transpose(rows);
    for (int64_t t = 0; t < std::min(SIDE, tokens); t++)
        store(out + t * outputs, bias ? rows[t] + load(bias) : rows[t]);
}

// 32 outputs by 16 · B tokens.
template <int B>
void block(const bf16* w, const bf16* packed, const bf16* bias, bf16* out, int64_t tokens, int64_t hidden,
           int64_t outputs) {
    const int64_t next = hidden * SIDE;  // packed numbers of 16 tokens
    _tile_zero(0);
    _tile_zero(1);
    if (B == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < hidden; i += DEPTH) {
        _tile_loadd(4, w + i, hidden * 2);
        _tile_loadd(5, w + SIDE * hidden + i, hidden * 2);
        _tile_loadd(6, packed + i * SIDE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (B == 2) {
            _tile_loadd(7, packed + next + i * SIDE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float found[4][SIDE * SIDE];
    _tile_stored(0, found[0], 64);
    _tile_stored(1, found[1], 64);
    keep(found[0], bias, out, outputs, tokens);
    keep(found[1], bias ? bias + SIDE : nullptr, out + SIDE, outputs, tokens);
    if (B == 2) {
        _tile_stored(2, found[2], 64);
        _tile_stored(3, found[3], 64);
        keep(found[2], bias, out + SIDE * outputs, outputs, tokens - SIDE);
        keep(found[3], bias ? bias + SIDE : nullptr, out + SIDE * outputs + SIDE, outputs, tokens - SIDE);
    }
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

// hidden and outputs are multiples of 32.
void siirl_tiles_linear(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int64_t tokens, int64_t hidden,
                        int64_t outputs) {
#ifdef SIIRL_TILES
    static thread_local std::vector<bf16> scratch;
    scratch.resize((tokens + SIDE - 1) / SIDE * SIDE * hidden);
    bf16* packed = scratch.data();
    pack(x, tokens, hidden, packed);
#pragma omp parallel if (tokens * hidden * outputs > 262144)
    {
        configure();
#pragma omp for schedule(static)
        for (int64_t o = 0; o < outputs; o += 2 * SIDE)
            for (int64_t t = 0; t < tokens; t += 2 * SIDE) {
                const bf16* bias_o = bias ? bias + o : nullptr;
                bf16* into = out + t * outputs + o;
                if (tokens - t > SIDE)
                    block<2>(w + o * hidden, packed + t * hidden, bias_o, into, tokens - t, hidden, outputs);
                else
                    block<1>(w + o * hidden, packed + t * hidden, bias_o, into, tokens - t, hidden, outputs);
            }
        _tile_release();
    }
#endif
}
}
