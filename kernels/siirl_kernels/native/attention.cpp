// Attention of a sequence's queries to keys and values that lie anywhere: in a paged cache or among packed tokens.
//
// The query heads that share a key head are rows of one problem, so that each key and value is read once for all of
// them. Scores of all keys first, then the softmax, then the values in the order of the keys: a row's additions do not
// depend on the rows beside it nor on how the sequence was cut into calls.
#include "functions.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace siirl {
namespace {

constexpr int64_t ROWS = 16, KEYS = 16;  // rows of a key head together, unless one token has more; keys together

struct Shape {
    int64_t heads, key_heads, size;
    int64_t padded() const { return (size + LANES - 1) / LANES * LANES; }
};

struct Scratch {
    std::vector<float> q, scores, copies, out;
    std::vector<int64_t> sees;
};

// Rows of keys or values, at most KEYS, and rows as many behind them that come closer while these are read.
template <class E>
struct Rows {
    const E *at[KEYS], *ahead[KEYS];
    int64_t count;
};

template <class E>
inline void foresee(const E* ahead, int64_t i) {
    if (i * int64_t(sizeof(E)) % 64 == 0) __builtin_prefetch(ahead + i);
}

// scores[r][j] = q[r] · key j for R rows, C keys at a time.
template <int R, int C, class E>
void score(const float* q, int64_t padded, const Rows<E>& keys, float* scores, int64_t width) {
    static_assert(R * C <= LANES, "one vector of results");
    for (int64_t j = 0; j < keys.count; j += C) {
        const E *at[C], *ahead[C];
        for (int c = 0; c < C; c++) {
            int64_t key = std::min(j + c, keys.count - 1);
            at[c] = keys.at[key], ahead[c] = keys.ahead[key];
        }
        vec acc[LANES] = {};
        for (int64_t i = 0; i < padded; i += LANES) {
            vec a[R];
            for (int r = 0; r < R; r++) a[r] = load(q + r * padded + i);
            for (int c = 0; c < C; c++) {
                foresee(ahead[c], i);
                vec b = load(at[c] + i);
                for (int r = 0; r < R; r++) acc[r * C + c] += a[r] * b;
            }
        }
        vec found = sums(acc);
        for (int r = 0; r < R; r++)  // what is behind the last key no row sees
            std::memcpy(scores + r * width + j, (const char*)&found + r * C * sizeof(float), C * sizeof(float));
    }
}

template <class E>
void score_all(const float* q, int64_t padded, const Rows<E>& keys, float* scores, int64_t width, int64_t rows) {
    for (; rows >= 4; rows -= 4, q += 4 * padded, scores += 4 * width) score<4, 4>(q, padded, keys, scores, width);
    if (rows == 3) score<3, 4>(q, padded, keys, scores, width);
    if (rows == 2) score<2, 8>(q, padded, keys, scores, width);
    if (rows == 1) score<1, 16>(q, padded, keys, scores, width);
}

// out[r] += sum over keys of weight · value, in the order of the keys, for NV vectors of the head.
template <int R, int NV, class E>
void mix(const float* weights, int64_t width, const Rows<E>& values, float* out, int64_t padded, int64_t first) {
    vec acc[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) acc[r][v] = load(out + r * padded + first + v * LANES);
    for (int64_t j = 0; j < values.count; j++) {
        vec value[NV];
        for (int v = 0; v < NV; v++) {
            foresee(values.ahead[j], first + v * LANES);
            value[v] = load(values.at[j] + first + v * LANES);
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) acc[r][v] += splat(weights[r * width + j]) * value[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) store(out + r * padded + first + v * LANES, acc[r][v]);
}

template <int R, class E>
void mix_some(const float* weights, int64_t width, const Rows<E>& values, float* out, int64_t padded) {
    int64_t first = 0;
    for (; first + 4 * LANES <= padded; first += 4 * LANES) mix<R, 4>(weights, width, values, out, padded, first);
    for (; first + 2 * LANES <= padded; first += 2 * LANES) mix<R, 2>(weights, width, values, out, padded, first);
    for (; first < padded; first += LANES) mix<R, 1>(weights, width, values, out, padded, first);
}

template <class E>
void mix_all(const float* weights, int64_t width, const Rows<E>& values, float* out, int64_t padded, int64_t rows) {
    for (; rows >= 4; rows -= 4, weights += 4 * width, out += 4 * padded)
        mix_some<4>(weights, width, values, out, padded);
    if (rows == 3) mix_some<3>(weights, width, values, out, padded);
    if (rows == 2) mix_some<2>(weights, width, values, out, padded);
    if (rows == 1) mix_some<1>(weights, width, values, out, padded);
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

// Keys or values of a sequence: row j of every key head, beginning at `base + offsets[j] * stride`.
template <class E>
struct Cached {
    const E* base;
    const int64_t* offsets;
    int64_t stride, count;
    const E* row(int64_t j) const { return base + offsets[j] * stride; }
};

// Visits rows of `cached`, at most KEYS at a time, head by head: visit(head, first row, rows). While the last ones are
// read the first ones of `then` come closer.
template <class E, class F>
void each(const Cached<E>& cached, const Cached<E>& then, const Shape& shape, std::vector<float>& copies, F&& visit) {
    bool whole = shape.padded() == shape.size;
    Rows<E> rows;
    Rows<float> padded;
    for (int64_t j = 0; j < cached.count; j += KEYS) {
        padded.count = rows.count = std::min(KEYS, cached.count - j);
        for (int64_t i = 0; i < rows.count; i++) {
            int64_t next = j + i + KEYS;
            rows.at[i] = cached.row(j + i);
            rows.ahead[i] = next < cached.count ? cached.row(next) : then.row(std::min(next - cached.count, then.count - 1));
        }
        for (int64_t h = 0; h < shape.key_heads; h++) {
            if (whole) {
                visit(h, j, rows);
            } else {  // as float32, filled up with zeros
                copies.resize(KEYS * shape.padded());
                for (int64_t i = 0; i < rows.count; i++) {
                    float* copy = copies.data() + i * shape.padded();
                    for (int64_t v = 0; v < shape.size; v += LANES)
                        store(copy + v, load_upto(rows.at[i] + v, shape.size - v));
                    padded.at[i] = padded.ahead[i] = copy;
                }
                visit(h, j, padded);
            }
            for (int64_t i = 0; i < rows.count; i++) rows.at[i] += shape.size, rows.ahead[i] += shape.size;
        }
    }
}

// `rows` rows of q for each key head (padded float32, scaled); row r sees the first sees[r] keys. Keys, then values,
// are read once; then come the keys of the sequence behind this one.
template <class E>
void attend(const float* q, int64_t rows, const int64_t* sees, const Cached<E>& keys, const Cached<E>& values,
            const Cached<E>& then, const Shape& shape, Scratch& s, float* out) {
    int64_t padded = shape.padded(), width = (keys.count + LANES - 1) / LANES * LANES;
    if (s.scores.size() < size_t(shape.key_heads * rows * width)) s.scores.resize(shape.key_heads * rows * width);
    float* scores = s.scores.data();
    each(keys, values, shape, s.copies, [&](int64_t h, int64_t j, const auto& some) {
        score_all(q + h * rows * padded, padded, some, scores + h * rows * width + j, width, rows);
    });
    for (int64_t r = 0; r < shape.key_heads * rows; r++) softmax(scores + r * width, sees[r % rows], width);
    std::fill(out, out + shape.key_heads * rows * padded, 0.0f);
    each(values, then, shape, s.copies, [&](int64_t h, int64_t j, const auto& some) {
        mix_all(scores + h * rows * width + j, width, some, out + h * rows * padded, padded, rows);
    });
}

// What the sequences of a call are: where their queries begin, how many keys each has, where those lie.
struct Sequences {
    std::vector<int64_t> queries, lengths, first;  // first[b]: of sequence b's keys in `offsets`
    std::vector<int64_t> offsets;                  // row of each key
    int64_t count(int64_t b) const { return queries[b + 1] - queries[b]; }
};

// Some queries of a sequence, all heads.
struct Work {
    int64_t sequence, token, tokens;
};

template <class E>
void run(const E* q, const E* keys, const E* values, const Sequences& sequences, const Shape& shape, E* out) {
    int64_t group = shape.heads / shape.key_heads, padded = shape.padded();
    int64_t together = std::max<int64_t>(1, ROWS / group), most = together * group;
    float scale = 1.0f / std::sqrt(float(shape.size));
    static thread_local std::vector<Work> work;
    work.clear();
    for (int64_t b = 0; b + 1 < int64_t(sequences.queries.size()); b++)
        for (int64_t token = 0; token < sequences.count(b); token += together)
            work.push_back({b, token, std::min(together, sequences.count(b) - token)});
    const std::vector<Work>& all = work;  // this thread's, for every thread
#pragma omp parallel if (all.size() > 1)
    {
        static thread_local Scratch s;
        s.q.resize(shape.key_heads * most * padded);
        s.out.resize(shape.key_heads * most * padded);
        s.sees.resize(most);
#pragma omp for schedule(dynamic)
        for (int64_t w = 0; w < int64_t(all.size()); w++) {
            auto [b, first, tokens] = all[w];
            int64_t rows = tokens * group;
            int64_t before = sequences.lengths[b] - sequences.count(b) + first;
            for (int64_t r = 0; r < rows; r++) s.sees[r] = before + r / group + 1;
            // head h of token t is row t · group + h % group of key head h / group
            auto heads = [&](auto&& visit) {
                for (int64_t t = 0; t < tokens; t++)
                    for (int64_t h = 0; h < shape.heads; h++)
                        visit(((sequences.queries[b] + first + t) * shape.heads + h) * shape.size,
                              (h / group * rows + t * group + h % group) * padded);
            };
            heads([&](int64_t from, int64_t to) {
                for (int64_t i = 0; i < shape.size; i += LANES)
                    store(s.q.data() + to + i, load_upto(q + from + i, shape.size - i) * scale);
            });
            int64_t stride = shape.key_heads * shape.size, longest = s.sees[rows - 1];
            const int64_t* offsets = sequences.offsets.data() + sequences.first[b];
            int64_t behind = int64_t(sequences.offsets.size()) - sequences.first[b] - sequences.lengths[b];
            Cached<E> own_keys{keys, offsets, stride, longest}, own_values{values, offsets, stride, longest};
            Cached<E> then{keys, behind ? offsets + sequences.lengths[b] : offsets, stride, behind ? behind : longest};
            attend(s.q.data(), rows, s.sees.data(), own_keys, own_values, then, shape, s, s.out.data());
            heads([&](int64_t to, int64_t from) {
                for (int64_t i = 0; i < shape.size; i += LANES)
                    store_upto(out + to + i, load(s.out.data() + from + i), shape.size - i);
            });
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
        for (int64_t p = 0; p < lengths[b]; p += block_size) {
            int64_t first = tables[b * blocks + p / block_size] * block_size;
            for (int64_t i = 0; i < std::min(block_size, lengths[b] - p); i++) sequences.offsets.push_back(first + i);
        }
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
