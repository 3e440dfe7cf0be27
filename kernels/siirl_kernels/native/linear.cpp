// x · weightᵀ for few rows of float32, the weight as it is, read once: [T, H] · [O, H]ᵀ + bias = [T, O].
#include <algorithm>

#include "vec.h"

namespace siirl {
namespace {

constexpr int64_t BLOCK = 128;          // tokens whose x stays in the second-level cache
constexpr int64_t CACHED = 28 * 1024;  // bytes of weight that stay in the first-level cache beside four rows of x

template <int R, int C>
void tile(const float* x, const float* w, const float* bias, float* out, int64_t hidden, int64_t outputs, int64_t o,
          const float* ahead) {
    const float *rows[R], *columns[C];
    int64_t width = std::min<int64_t>(C, outputs - o);
    for (int r = 0; r < R; r++) rows[r] = x + r * hidden;
    for (int c = 0; c < C; c++) columns[c] = w + (o + std::min<int64_t>(c, width - 1)) * hidden;
    float found[LANES];
    store(found, dots<R, C>(rows, columns, hidden, ahead));
    for (int i = 0; bias && i < R * C; i++) found[i] += bias[o + std::min<int64_t>(i % C, width - 1)];
    for (int r = 0; r < R; r++) {
        if (width == C)
            std::memcpy(out + r * outputs + o, found + r * C, sizeof(float) * C);
        else
            std::memcpy(out + r * outputs + o, found + r * C, sizeof(float) * width);
    }
}

template <int R, int C>
void strip(const float* x, const float* w, const float* bias, float* out, int64_t hidden, int64_t outputs, int64_t o,
           int64_t end, const float* ahead) {
    for (; o < end; o += C) {
        tile<R, C>(x, w, bias, out, hidden, outputs, o, ahead);
        if (ahead) ahead += hidden;
    }
}

// Outputs `from` … `to` of all tokens.
void columns(const float* x, const float* w, const float* bias, float* out, int64_t tokens, int64_t hidden,
             int64_t outputs, int64_t from, int64_t to) {
    int64_t t = 0;
    // the next group's rows of the weight, one for every tile of this one's
    const float* ahead = to + (to - from) <= outputs ? w + to * hidden : nullptr;
    for (; t + 4 <= tokens; t += 4, ahead = ahead && t < 16 ? ahead + (to - from) / 4 * hidden : nullptr)
        strip<4, 4>(x + t * hidden, w, bias, out + t * outputs, hidden, outputs, from, to, ahead);
    const float* rest = x + t * hidden;
    float* into = out + t * outputs;
    if (tokens - t == 3) strip<3, 4>(rest, w, bias, into, hidden, outputs, from, to, nullptr);
    if (tokens - t == 2) strip<2, 8>(rest, w, bias, into, hidden, outputs, from, to, nullptr);
    if (tokens - t == 1) strip<1, 16>(rest, w, bias, into, hidden, outputs, from, to, nullptr);
}

}  // namespace
}  // namespace siirl

using namespace siirl;

extern "C" void siirl_linear(const float* x, const float* w, const float* bias, float* out, int64_t tokens,
                             int64_t hidden, int64_t outputs) {
    int64_t group = std::max<int64_t>(4, CACHED / (LANES * std::max<int64_t>(hidden, 1)) * 4);
    if (tokens < 4) group = (group + LANES - 1) / LANES * LANES;  // their strips are up to as wide
    int64_t groups = (outputs + group - 1) / group;
    for (int64_t t = 0; t < tokens; t += BLOCK) {
        int64_t count = std::min(BLOCK, tokens - t);
#pragma omp parallel for schedule(static) if (count * hidden * outputs > 262144)
        for (int64_t g = 0; g < groups; g++)
            columns(x + t * hidden, w, bias, out + t * outputs, count, hidden, outputs, g * group,
                    std::min(outputs, (g + 1) * group));
    }
}
