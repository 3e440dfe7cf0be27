// Attention of a sequence's queries to keys and values that lie anywhere: in a paged cache or among packed tokens.
//
// The query heads that share a key head are rows of one problem, sixteen rows at a time, so that each key and value is
// read once for all of them. Scores of all keys first, then the softmax, then the values in the order of the keys: a
// row's additions do not depend on the rows beside it nor on how the sequence was cut into calls.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace siirl {
namespace {

constexpr int ROWS = 16, KEYS = 32;

struct Shape {
    int64_t heads, key_heads, size;
    int64_t padded() const { return (size + LANES - 1) / LANES * LANES; }
};

struct Scratch {
    std::vector<float> q, scores, keys, values, out;
    std::vector<const float*> at;
};

// Rows of `size` numbers at `base + offset * stride`, as float32 of the padded size: in place if they are that already.
template <class E>
void gather(const E* base, const int64_t* offsets, int64_t stride, int64_t count, const Shape& shape,
            std::vector<float>& copies, const float** at) {
    int64_t padded = shape.padded();
    if constexpr (std::is_same_v<E, float>)
        if (padded == shape.size) {
            for (int64_t j = 0; j < count; j++) at[j] = base + offsets[j] * stride;
            return;
        }
    if (copies.size() < size_t(KEYS * padded)) copies.resize(KEYS * padded);
    for (int64_t j = 0; j < count; j++) {
        const E* from = base + offsets[j] * stride;
        float* to = copies.data() + j * padded;
        for (int64_t i = 0; i < shape.size; i += LANES) store(to + i, load_upto(from + i, shape.size - i));
        at[j] = to;
    }
}

template <int R, int C>
void score(const float* q, int64_t padded, const float* const* keys, int64_t count, float* scores, int64_t width) {
    const float *rows[R], *columns[C];
    for (int r = 0; r < R; r++) rows[r] = q + r * padded;
    for (int64_t j = 0; j < count; j += C) {
        int64_t n = std::min<int64_t>(C, count - j);
        for (int c = 0; c < C; c++) columns[c] = keys[j + std::min<int64_t>(c, n - 1)];
        float found[LANES];
        store(found, dots<R, C>(rows, columns, padded));
        for (int r = 0; r < R; r++) std::copy(found + r * C, found + r * C + n, scores + r * width + j);
    }
}

// out[r] += sum over keys of weight · value, in the order of the keys, for NV vectors of the head.
template <int R, int NV>
void mix(const float* weights, int64_t width, const float* const* values, int64_t count, float* out, int64_t padded,
         int64_t first) {
    vec acc[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) acc[r][v] = load(out + r * padded + first + v * LANES);
    for (int64_t j = 0; j < count; j++) {
        vec value[NV];
        for (int v = 0; v < NV; v++) value[v] = load(values[j] + first + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) acc[r][v] += splat(weights[r * width + j]) * value[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) store(out + r * padded + first + v * LANES, acc[r][v]);
}

template <int R>
void mix_all(const float* weights, int64_t width, const float* const* values, int64_t count, float* out,
             int64_t padded) {
    int64_t first = 0;
    for (; first + 4 * LANES <= padded; first += 4 * LANES)
        mix<R, 4>(weights, width, values, count, out, padded, first);
    for (; first + 2 * LANES <= padded; first += 2 * LANES)
        mix<R, 2>(weights, width, values, count, out, padded, first);
    for (; first < padded; first += LANES) mix<R, 1>(weights, width, values, count, out, padded, first);
}

// Weights of the keys a row sees, 0 behind them up to `width`.
void softmax(float* row, int64_t sees, int64_t width) {
    vec m = splat(-INF), total = {};
    for (int64_t i = 0; i < sees; i += LANES) m = larger(load_upto(row + i, sees - i, -INF), m);
    float top = largest(m);
    for (int64_t i = 0; i < sees; i += LANES) {
        vec e = exp(load_upto(row + i, sees - i, -INF) - top);
        store(row + i, e);
        total += e;
    }
    float factor = 1.0f / sum(total);
    int64_t end = (sees + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < end; i += LANES) store(row + i, load(row + i) * factor);
    std::fill(row + end, row + std::max(end, width), 0.0f);
}

// Rows lie apart by the other heads, a step that hardware does not foresee.
template <class E>
void foresee(const E* base, const int64_t* offsets, int64_t stride, int64_t count, int64_t size) {
    for (int64_t j = 0; j < count; j++) {
        const char* from = (const char*)(base + offsets[j] * stride);
        for (int64_t i = 0; i < size * int64_t(sizeof(E)); i += 64) __builtin_prefetch(from + i);
    }
}

// One problem: `rows` rows of q (padded float32, scaled); row r sees the first sees[r] keys.
template <class E>
void attend(const float* q, int64_t rows, const int64_t* sees, const E* keys, const E* values, const int64_t* offsets,
            const Shape& shape, Scratch& s, float* out) {
    int64_t padded = shape.padded(), stride = shape.key_heads * shape.size;
    int64_t longest = *std::max_element(sees, sees + rows), width = (longest + LANES - 1) / LANES * LANES;
    if (s.scores.size() < size_t(ROWS * width)) s.scores.resize(ROWS * width);
    s.at.resize(KEYS);
    float* scores = s.scores.data();
    for (int64_t j = 0; j < longest; j += KEYS) {
        int64_t count = std::min<int64_t>(KEYS, longest - j), r = 0;
        int64_t next = std::min<int64_t>(KEYS, longest - j - count);
        foresee(keys, offsets + j + count, stride, next, shape.size);
        if (next == 0) foresee(values, offsets, stride, std::min<int64_t>(KEYS, longest), shape.size);
        gather(keys, offsets + j, stride, count, shape, s.keys, s.at.data());
        for (; r + 4 <= rows; r += 4)
            score<4, 4>(q + r * padded, padded, s.at.data(), count, scores + r * width + j, width);
        const float* rest = q + r * padded;
        float* into = scores + r * width + j;
        if (rows - r == 3) score<3, 4>(rest, padded, s.at.data(), count, into, width);
        if (rows - r == 2) score<2, 8>(rest, padded, s.at.data(), count, into, width);
        if (rows - r == 1) score<1, 16>(rest, padded, s.at.data(), count, into, width);
    }
    for (int64_t r = 0; r < rows; r++) softmax(scores + r * width, sees[r], width);
    std::fill(out, out + rows * padded, 0.0f);
    for (int64_t j = 0; j < longest; j += KEYS) {
        int64_t count = std::min<int64_t>(KEYS, longest - j), r = 0;
        foresee(values, offsets + j + count, stride, std::min<int64_t>(KEYS, longest - j - count), shape.size);
        gather(values, offsets + j, stride, count, shape, s.values, s.at.data());
        for (; r + 4 <= rows; r += 4)
            mix_all<4>(scores + r * width + j, width, s.at.data(), count, out + r * padded, padded);
        const float* weights = scores + r * width + j;
        if (rows - r == 3) mix_all<3>(weights, width, s.at.data(), count, out + r * padded, padded);
        if (rows - r == 2) mix_all<2>(weights, width, s.at.data(), count, out + r * padded, padded);
        if (rows - r == 1) mix_all<1>(weights, width, s.at.data(), count, out + r * padded, padded);
    }
}

// What the sequences of a call are: where their queries begin, how many keys each has, where those lie.
struct Sequences {
    std::vector<int64_t> queries, lengths, first;  // first[b]: of sequence b's keys in `offsets`
    std::vector<int64_t> offsets;                  // row of each key
    int64_t count(int64_t b) const { return queries[b + 1] - queries[b]; }
};

struct Work {
    int64_t sequence, key_head, row;
};

template <class E>
void run(const E* q, const E* keys, const E* values, const Sequences& sequences, const Shape& shape, E* out) {
    int64_t group = shape.heads / shape.key_heads, padded = shape.padded();
    float scale = 1.0f / std::sqrt(float(shape.size));
    std::vector<Work> work;
    for (int64_t b = 0; b + 1 < int64_t(sequences.queries.size()); b++)
        for (int64_t k = 0; k < shape.key_heads; k++)
            for (int64_t row = 0; row < sequences.count(b) * group; row += ROWS) work.push_back({b, k, row});
#pragma omp parallel if (work.size() > 1)
    {
        static thread_local Scratch s;
        s.q.resize(ROWS * padded);
        s.out.resize(ROWS * padded);
#pragma omp for schedule(dynamic)
        for (int64_t w = 0; w < int64_t(work.size()); w++) {
            auto [b, k, first] = work[w];
            int64_t count = sequences.count(b), rows = std::min<int64_t>(ROWS, count * group - first);
            int64_t sees[ROWS], at[ROWS];
            for (int64_t r = 0; r < rows; r++) {
                int64_t token = (first + r) / group, head = k * group + (first + r) % group;
                at[r] = ((sequences.queries[b] + token) * shape.heads + head) * shape.size;
                sees[r] = sequences.lengths[b] - count + token + 1;
                for (int64_t i = 0; i < shape.size; i += LANES)
                    store(s.q.data() + r * padded + i, load_upto(q + at[r] + i, shape.size - i) * scale);
            }
            const int64_t* offsets = sequences.offsets.data() + sequences.first[b];
            attend(s.q.data(), rows, sees, keys + k * shape.size, values + k * shape.size, offsets, shape, s,
                   s.out.data());
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < shape.size; i += LANES)
                    store_upto(out + at[r] + i, load(s.out.data() + r * padded + i), shape.size - i);
        }
    }
}

template <class E>
void paged(const E* q, const E* k, const E* v, E* keys, E* values, const int32_t* tables, const int32_t* lengths,
           const int32_t* starts, const int64_t* slots, int64_t batch, int64_t blocks, int64_t block_size,
           const Shape& shape, E* out) {
    int64_t stride = shape.key_heads * shape.size;
    for (int64_t t = 0; t < starts[batch]; t++) {
        std::memcpy(keys + slots[t] * stride, k + t * stride, stride * sizeof(E));
        std::memcpy(values + slots[t] * stride, v + t * stride, stride * sizeof(E));
    }
    static thread_local Sequences sequences;
    sequences.queries.assign(starts, starts + batch + 1);
    sequences.lengths.assign(lengths, lengths + batch);
    sequences.first.clear();
    sequences.offsets.clear();
    for (int64_t b = 0; b < batch; b++) {
        sequences.first.push_back(sequences.offsets.size());
        for (int64_t p = 0; p < lengths[b]; p++)
            sequences.offsets.push_back(tables[b * blocks + p / block_size] * block_size + p % block_size);
    }
    run(q, keys, values, sequences, shape, out);
}

}  // namespace
}  // namespace siirl

using namespace siirl;

extern "C" {

void siirl_paged_attention(int half, const void* q, const void* k, const void* v, void* keys, void* values,
                           const int32_t* tables, const int32_t* lengths, const int32_t* starts, const int64_t* slots,
                           int64_t batch, int64_t blocks, int64_t block_size, int64_t heads, int64_t key_heads,
                           int64_t size, void* out) {
    Shape shape{heads, key_heads, size};
    if (half)
        paged((const bf16*)q, (const bf16*)k, (const bf16*)v, (bf16*)keys, (bf16*)values, tables, lengths, starts,
              slots, batch, blocks, block_size, shape, (bf16*)out);
    else
        paged((const float*)q, (const float*)k, (const float*)v, (float*)keys, (float*)values, tables, lengths, starts,
              slots, batch, blocks, block_size, shape, (float*)out);
}

// `starts` [B + 1] of the sequences' own tokens, `lengths` [B] with what they share, `whole` the packed tokens of the
// whole sequences one after another.
void siirl_packed_attention(const float* q, const float* k, const float* v, const int64_t* starts,
                            const int64_t* lengths, const int64_t* whole, int64_t batch, int64_t heads,
                            int64_t key_heads, int64_t size, float* out) {
    Sequences sequences;
    sequences.queries.assign(starts, starts + batch + 1);
    sequences.lengths.assign(lengths, lengths + batch);
    int64_t total = 0;
    for (int64_t b = 0; b < batch; b++) sequences.first.push_back(total), total += lengths[b];
    sequences.offsets.assign(whole, whole + total);
    run(q, k, v, sequences, Shape{heads, key_heads, size}, out);
}
}
