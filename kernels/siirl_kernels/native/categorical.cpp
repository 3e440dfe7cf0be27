// A row of logits: its softmax's sum, a token drawn from it, a token's log-prob, its entropy.
//
// Drawing and training's log-probs share `Row`, so a token's log-prob has the same bits in both.
#include <vector>

#include "vec.h"

namespace siirl {
namespace {

inline void narrow(float* p, float x) { *p = x; }
inline void narrow(bf16* p, float x) { store_part(p, splat(x), 1); }

constexpr int64_t BLOCK = 256;  // summed in float32; blocks add up in float64

template <class E>
struct Row {
    const E* logits;
    int64_t words;
    float temperature;
    float top = -INF;
    double total = 0.0, weighted = 0.0;  // sum of e^(z - top), and of that times z - top

    Row(const E* logits, int64_t words, float temperature, float top)
        : logits(logits), words(words), temperature(temperature), top(top) {}

    Row(const E* logits, int64_t words, float temperature)
        : logits(logits), words(words), temperature(temperature) {
        vec m = splat(-INF);
        for (int64_t i = 0; i < words; i += LANES) m = larger(scaled(i), m);
        top = largest(m);
    }

    vec scaled(int64_t i) const {
        vec z = load_upto(logits + i, words - i, -INF);
        return temperature == 1.0f ? z : z / temperature;
    }

    // Sums of the blocks go to `blocks` if it is given.
    template <bool ENTROPY>
    void add_up(double* blocks) {
        for (int64_t from = 0; from < words; from += BLOCK) {
            vec part = {}, product = {};
            for (int64_t i = from; i < from + BLOCK && i < words; i += LANES) {
                vec z = scaled(i) - top, e = exp(z);
                part += e;
                if (ENTROPY) product += z > -86.5f ? e * z : vec{};
            }
            double block = sum(part);
            if (blocks) blocks[from / BLOCK] = block;
            total += block;
            if (ENTROPY) weighted += sum(product);
        }
    }

    float log_prob(int64_t token) const {
        float z = widen(logits[token]);
        if (temperature != 1.0f) z /= temperature;
        return float(double(z - top) - std::log(total));
    }

    float entropy() const { return float(std::log(total) - weighted / total); }

    int64_t first_of_largest() const {
        for (int64_t i = 0; i < words; i++)
            if (widen(logits[i]) == top) return i;
        return 0;
    }

    // The first token at which the cumulated sum exceeds uniform * total; rounding never takes it past the last.
    int64_t draw(float uniform, const double* blocks) const {
        double wanted = uniform * total, before = 0.0;
        int64_t from = 0, last = 0;
        for (; from + BLOCK < words && before + blocks[from / BLOCK] <= wanted; from += BLOCK)
            before += blocks[from / BLOCK];
        for (int64_t i = from; i < words; i += LANES) {
            float e[LANES];
            store(e, exp(scaled(i) - top));
            for (int lane = 0; lane < LANES && i + lane < words; lane++) {
                before += e[lane];
                if (e[lane] > 0.0f) last = i + lane;
                if (before > wanted && e[lane] > 0.0f) return last;
            }
        }
        for (int64_t i = from; last == 0 && i > 0; i--)  // all behind `from` are impossible
            if (widen(logits[i]) > -INF) last = i;
        return last;
    }
};

template <class E>
void categorical(const E* logits, const float* uniform, int64_t rows, int64_t words, float temperature, int64_t* tokens,
                 float* log_probs) {
#pragma omp parallel for schedule(static) if (rows * words > 16384)
    for (int64_t r = 0; r < rows; r++) {
        Row<E> row(logits + r * words, words, temperature == 0.0f ? 1.0f : temperature);
        std::vector<double> blocks((words + BLOCK - 1) / BLOCK);
        row.template add_up<false>(blocks.data());
        tokens[r] = temperature == 0.0f ? row.first_of_largest() : row.draw(uniform[r], blocks.data());
        log_probs[r] = row.log_prob(tokens[r]);
    }
}

// Entropies, and `sums` [rows, 2] of the largest and of log(sum of e^(z - largest)), only where they are asked for.
template <class E>
void log_prob(const E* logits, const int64_t* targets, int64_t rows, int64_t words, float temperature,
              float* log_probs, float* entropies, float* sums) {
#pragma omp parallel for schedule(static) if (rows * words > 16384)
    for (int64_t r = 0; r < rows; r++) {
        Row<E> row(logits + r * words, words, temperature);
        if (entropies)
            row.template add_up<true>(nullptr);
        else
            row.template add_up<false>(nullptr);
        log_probs[r] = row.log_prob(targets[r]);
        if (entropies) entropies[r] = row.entropy();
        if (sums) sums[2 * r] = row.top, sums[2 * r + 1] = float(std::log(row.total));
    }
}

// With z = logits / temperature, p = softmax(z): (onehot - p) grad - p (log p + entropy) grad_entropy, over temperature.
template <class E>
void log_prob_gradient(const E* logits, const int64_t* targets, int64_t rows, int64_t words, float temperature,
                       const float* sums, const float* entropies, const float* grad, const float* grad_entropy,
                       E* grad_logits) {
    float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(static) if (rows * words > 16384)
    for (int64_t r = 0; r < rows; r++) {
        Row<E> row{logits + r * words, words, temperature, sums[2 * r]};
        E* out = grad_logits + r * words;
        float g = grad[r] * inverse, total = sums[2 * r + 1];
        float log_p = widen(row.logits[targets[r]]) / temperature - row.top - total;  // before it is written over
        if (grad_entropy) {
            float h = grad_entropy[r] * inverse, entropy = entropies[r];
            for (int64_t i = 0; i < words; i += LANES) {
                vec all = row.scaled(i) - row.top - total, p = exp(all);
                // a word without any probability may have a log-prob of -infinity
                vec both = p > 0.0f ? -p * (g + h * (all + entropy)) : vec{};
                store_upto(out + i, both, words - i);
            }
        } else {
            for (int64_t i = 0; i < words; i += LANES)
                store_upto(out + i, exp(row.scaled(i) - row.top - total) * -g, words - i);
        }
        float p = exp(splat(log_p))[0];
        float at = g - p * g - (grad_entropy && p > 0.0f ? grad_entropy[r] * inverse * p * (log_p + entropies[r]) : 0.0f);
        narrow(out + targets[r], at);
    }
}

}  // namespace
}  // namespace siirl

using namespace siirl;

extern "C" {

void siirl_categorical(int half, const void* logits, const float* uniform, int64_t rows, int64_t words,
                       float temperature, int64_t* tokens, float* log_probs) {
    if (half)
        categorical((const bf16*)logits, uniform, rows, words, temperature, tokens, log_probs);
    else
        categorical((const float*)logits, uniform, rows, words, temperature, tokens, log_probs);
}

void siirl_log_prob(int half, const void* logits, const int64_t* targets, int64_t rows, int64_t words,
                    float temperature, float* log_probs, float* entropies, float* sums) {
    if (half)
        log_prob((const bf16*)logits, targets, rows, words, temperature, log_probs, entropies, sums);
    else
        log_prob((const float*)logits, targets, rows, words, temperature, log_probs, entropies, sums);
}

void siirl_log_prob_gradient(int half, const void* logits, const int64_t* targets, int64_t rows, int64_t words,
                             float temperature, const float* sums, const float* entropies, const float* grad,
                             const float* grad_entropy, void* grad_logits) {
    if (half)
        log_prob_gradient((const bf16*)logits, targets, rows, words, temperature, sums, entropies, grad, grad_entropy,
                          (bf16*)grad_logits);
    else
        log_prob_gradient((const float*)logits, targets, rows, words, temperature, sums, entropies, grad, grad_entropy,
                          (float*)grad_logits);
}
}
