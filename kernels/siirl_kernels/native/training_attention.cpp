// Causal attention of packed sequences and its gradients, for training.
//
// A sequence and those that begin with its tokens are one family. All that is done for a family and a key head is done
// by one thread, which reads the shared keys once and adds up their gradients in one order. Of some tokens at a time
// the scores of all keys are there at once; only each row's log-sum-exp is kept for the backward pass.
#include <algorithm>
#include <vector>

#include "vec.h"

namespace siirl {
namespace {

#ifdef __AVX512F__
constexpr int TILE_ROWS = 6, TILE = 4;  // 24 of 32 registers are sums
#else
constexpr int TILE_ROWS = 6, TILE = 1;
#endif
constexpr int64_t PANEL = 4 * LANES;  // keys beside each other in a transposed panel
constexpr int64_t ROWS = 48;          // queries of one key head together

int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// A row and a column of `a` are so many numbers apart.
struct Left {
    const float* at;
    int64_t row, column;
};

template <int R, int V>
void tile(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
    vec acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = add ? load(c + r * c_row + v * LANES) : vec{};
    for (int64_t k = 0; k < depth; k++) {
        vec right[V];
        for (int v = 0; v < V; v++) right[v] = load(b + k * b_row + v * LANES);
        for (int r = 0; r < R; r++) {
            vec left = splat(a.at[r * a.row + k * a.column]);
            for (int v = 0; v < V; v++) acc[r][v] += left * right[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(c + r * c_row + v * LANES, acc[r][v]);
}

template <int R, int V>
void tile_rows(int64_t rows, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
    if (rows >= R)
        tile<R, V>(a, b, b_row, c, c_row, depth, add);
    else if constexpr (R > 1)
        tile_rows<R - 1, V>(rows, a, b, b_row, c, c_row, depth, add);
}

template <int V>
void columns(int64_t rows, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
        tile_rows<TILE_ROWS, V>(rows - r, {a.at + r * a.row, a.row, a.column}, b, b_row, c + r * c_row, c_row, depth, add);
}

// c = a · b, or c += a · b; `width` columns, rounded up to whole vectors.
void product(int64_t rows, int64_t width, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
             bool add) {
    int64_t at = 0;
    for (; at + TILE * LANES <= whole(width); at += TILE * LANES)
        columns<TILE>(rows, a, b + at, b_row, c + at, c_row, depth, add);
    for (; at < width; at += LANES) columns<1>(rows, a, b + at, b_row, c + at, c_row, depth, add);
}

struct Shape {
    int64_t heads, key_heads, size;
    int64_t group() const { return heads / key_heads; }
    int64_t padded() const { return whole(size); }
};

// One key head's keys or values of a sequence's own tokens, rows filled up to whole vectors, and in transposed panels.
struct Rows {
    std::vector<float> rows, panels;
    int64_t padded = 0;

    template <class E>
    void load_from(const E* x, int64_t stride, int64_t count, int64_t size) {
        padded = whole(size);
        rows.resize(count * padded);
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < size; i += LANES) store(rows.data() + j * padded + i, load_upto(x + j * stride + i, size - i));
    }

    void transpose_rows(int64_t count) {
        panels.resize((count + PANEL - 1) / PANEL * PANEL * padded);
        for (int64_t j = 0; j < whole(count); j += LANES)
            for (int64_t i = 0; i < padded; i += LANES) {
                vec square[LANES] = {};
                for (int64_t r = 0; r < std::min<int64_t>(LANES, count - j); r++)
                    square[r] = load(rows.data() + (j + r) * padded + i);
                transpose(square);
                float* to = panels.data() + j / PANEL * PANEL * padded + i * PANEL + j % PANEL;
                for (int64_t c = 0; c < LANES; c++) store(to + c * PANEL, square[c]);
            }
    }

    // c = a · rowsᵀ for the first `count` rows
    void times_transposed(int64_t rows_of_a, const float* a, int64_t count, float* c, int64_t c_row) const {
        for (int64_t j = 0; j < count; j += PANEL)
            product(rows_of_a, std::min(PANEL, count - j), padded, {a, padded, 1}, panels.data() + j * padded, PANEL,
                    c + j, c_row, false);
    }
};

// What a key head has of a sequence's own tokens, and their gradients.
struct Keys {
    Rows keys, values;
    std::vector<float> grad_keys, grad_values;
};

// Where the scores of a row lie: of the shared keys, then of its own sequence's, each filled up to whole vectors.
struct Columns {
    int64_t shared, own;
    int64_t begin() const { return whole(shared); }
    int64_t width() const { return begin() + whole(own); }
};

struct Scratch {
    Keys shared, own;
    std::vector<float> q, out, grad, scores, grad_scores, grad_q;
};

struct Sequences {
    const int64_t *starts, *parents, *prefixes;
    int64_t count;
    int64_t tokens(int64_t b) const { return starts[b + 1] - starts[b]; }
};

template <class E>
struct Attention {
    const E *q, *k, *v;
    Sequences sequences;
    Shape shape;
    E* out;
    float* sums;  // log-sum-exp of each token and head
    const E* grad = nullptr;
    E *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;

    void run() const {
        std::vector<std::vector<int64_t>> families(sequences.count);
        for (int64_t b = 0; b < sequences.count; b++) families[sequences.parents[b]].push_back(b);
        int64_t tasks = sequences.count * shape.key_heads;
#pragma omp parallel if (tasks > 1)
        {
            static thread_local Scratch s;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; task++)
                if (const auto& family = families[task / shape.key_heads]; !family.empty())
                    run_family(family, task % shape.key_heads, s);
        }
    }

    void run_family(const std::vector<int64_t>& family, int64_t head, Scratch& s) const {
        for (int64_t b : family) {
            bool first = b == sequences.parents[b];
            Keys& own = first ? s.shared : s.own;
            open(own, b, head);
            int64_t most = std::max<int64_t>(1, ROWS / shape.group());
            for (int64_t from = 0; from < sequences.tokens(b); from += most) {
                int64_t to = std::min(from + most, sequences.tokens(b));
                Columns columns{first ? 0 : sequences.prefixes[b], to};
                attend(own, s, b, head, from, to, columns);
            }
            if (grad && !first) close(own, b, head);
        }
        if (grad) close(s.shared, family[0], head);
    }

    int64_t key_at(int64_t b, int64_t head) const {
        return (sequences.starts[b] * shape.key_heads + head) * shape.size;
    }

    void open(Keys& own, int64_t b, int64_t head) const {
        int64_t count = sequences.tokens(b), stride = shape.key_heads * shape.size;
        own.keys.load_from(k + key_at(b, head), stride, count, shape.size);
        own.values.load_from(v + key_at(b, head), stride, count, shape.size);
        own.keys.transpose_rows(count);
        if (!grad) return;
        own.values.transpose_rows(count);
        own.grad_keys.assign(count * shape.padded(), 0.0f);
        own.grad_values.assign(count * shape.padded(), 0.0f);
    }

    void close(const Keys& own, int64_t b, int64_t head) const {
        int64_t stride = shape.key_heads * shape.size;
        for (int64_t j = 0; j < sequences.tokens(b); j++)
            for (int64_t i = 0; i < shape.size; i += LANES) {
                int64_t to = key_at(b, head) + j * stride + i, from = j * shape.padded() + i;
                store_upto(grad_k + to, load(own.grad_keys.data() + from), shape.size - i);
                store_upto(grad_v + to, load(own.grad_values.data() + from), shape.size - i);
            }
    }

    // Row r of a block is head r % group of token r / group: where it lies in [T, N].
    int64_t place(int64_t b, int64_t head, int64_t from, int64_t r) const {
        return (sequences.starts[b] + from + r / shape.group()) * shape.heads + head * shape.group() + r % shape.group();
    }

    void attend(const Keys& own, Scratch& s, int64_t b, int64_t head, int64_t from, int64_t to,
                Columns columns) const {
        int64_t rows = (to - from) * shape.group(), padded = shape.padded(), width = columns.width();
        float scale = 1.0f / std::sqrt(float(shape.size));
        s.q.resize(rows * padded), s.out.resize(rows * padded);
        if (int64_t(s.scores.size()) < rows * width) s.scores.resize(rows * width);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < shape.size; i += LANES)
                store(s.q.data() + r * padded + i,
                      load_upto(q + place(b, head, from, r) * shape.size + i, shape.size - i) * scale);
        float* scores = s.scores.data();
        s.shared.keys.times_transposed(rows, s.q.data(), columns.shared, scores, width);
        own.keys.times_transposed(rows, s.q.data(), columns.own, scores + columns.begin(), width);
        if (grad) return differentiate(const_cast<Keys&>(own), s, b, head, from, rows, columns);
        for (int64_t r = 0; r < rows; r++)
            sums[place(b, head, from, r)] = softmax(scores + r * width, columns, from + r / shape.group() + 1);
        product(rows, padded, columns.shared, {scores, width, 1}, s.shared.values.rows.data(), padded, s.out.data(),
                padded, false);
        product(rows, padded, columns.own, {scores + columns.begin(), width, 1}, own.values.rows.data(), padded,
                s.out.data(), padded, true);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < shape.size; i += LANES)
                store_upto(out + place(b, head, from, r) * shape.size + i, load(s.out.data() + r * padded + i),
                           shape.size - i);
    }

    // Visits the vectors of scores of a row that sees `sees` of its own sequence's keys: visit(at, how many count).
    template <class F>
    static void each(const Columns& columns, int64_t sees, F&& visit) {
        for (int64_t i = 0; i < columns.shared; i += LANES) visit(i, columns.shared - i);
        for (int64_t i = 0; i < sees; i += LANES) visit(columns.begin() + i, sees - i);
    }

    static void clear(float* row, const Columns& columns, int64_t sees) {
        std::fill(row + columns.begin() + whole(sees), row + columns.width(), 0.0f);
    }

    // Weights in the place of scores, 0 where nothing is seen; the log-sum-exp.
    static float softmax(float* row, const Columns& columns, int64_t sees) {
        vec most = splat(-INF), total = {};
        each(columns, sees, [&](int64_t i, int64_t n) { most = larger(load_upto(row + i, n, -INF), most); });
        float top = largest(most);
        each(columns, sees, [&](int64_t i, int64_t n) {
            vec e = exp(load_upto(row + i, n, -INF) - top);
            store(row + i, e);
            total += e;
        });
        float all = sum(total), factor = 1.0f / all;
        each(columns, sees, [&](int64_t i, int64_t) { store(row + i, load(row + i) * factor); });
        clear(row, columns, sees);
        return top + std::log(all);
    }

    // With w = softmax(s), ∂/∂s = w (∂/∂w - <out, ∂/∂out>).
    void differentiate(Keys& own, Scratch& s, int64_t b, int64_t head, int64_t from, int64_t rows,
                       Columns columns) const {
        int64_t padded = shape.padded(), width = columns.width();
        float scale = 1.0f / std::sqrt(float(shape.size)), *scores = s.scores.data();
        s.grad.resize(rows * padded), s.grad_q.resize(rows * padded);
        if (s.grad_scores.size() < s.scores.size()) s.grad_scores.resize(s.scores.size());
        float* grad_scores = s.grad_scores.data();
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < shape.size; i += LANES)
                store(s.grad.data() + r * padded + i,
                      load_upto(grad + place(b, head, from, r) * shape.size + i, shape.size - i));
        s.shared.values.times_transposed(rows, s.grad.data(), columns.shared, grad_scores, width);
        own.values.times_transposed(rows, s.grad.data(), columns.own, grad_scores + columns.begin(), width);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = place(b, head, from, r), sees = from + r / shape.group() + 1;
            vec dot = {};
            for (int64_t i = 0; i < shape.size; i += LANES)
                dot += load_upto(out + at * shape.size + i, shape.size - i) * load(s.grad.data() + r * padded + i);
            float* row = scores + r * width;
            float total = sum(dot), *grad_row = grad_scores + r * width;
            each(columns, sees, [&](int64_t i, int64_t n) {
                vec weight = exp(load_upto(row + i, n, -INF) - sums[at]);
                store(row + i, weight);
                store(grad_row + i, weight * (load(grad_row + i) - total));
            });
            clear(row, columns, sees);
            clear(grad_row, columns, sees);
        }
        float *to_q = s.grad_q.data(), *own_scores = scores + columns.begin(), *own_grad = grad_scores + columns.begin();
        product(rows, padded, columns.shared, {grad_scores, width, 1}, s.shared.keys.rows.data(), padded, to_q, padded, false);
        product(rows, padded, columns.own, {own_grad, width, 1}, own.keys.rows.data(), padded, to_q, padded, true);
        add_to(s.shared, columns.shared, rows, scores, grad_scores, width, s);
        add_to(own, columns.own, rows, own_scores, own_grad, width, s);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < shape.size; i += LANES)
                store_upto(grad_q + place(b, head, from, r) * shape.size + i, load(to_q + r * padded + i) * scale,
                           shape.size - i);
    }

    // The part of a block of rows in the gradients of keys and values.
    void add_to(Keys& to, int64_t count, int64_t rows, const float* weights, const float* grad_scores, int64_t width,
                const Scratch& s) const {
        int64_t padded = shape.padded();
        product(count, padded, rows, {weights, 1, width}, s.grad.data(), padded, to.grad_values.data(), padded, true);
        product(count, padded, rows, {grad_scores, 1, width}, s.q.data(), padded, to.grad_keys.data(), padded, true);
    }
};

}  // namespace
}  // namespace siirl

using namespace siirl;

extern "C" {

// `starts` [B + 1] of the sequences' own tokens; each begins with the first `prefixes` [B] of its parent's.
void siirl_training_attention(int half, const void* q, const void* k, const void* v, const int64_t* starts,
                              const int64_t* parents, const int64_t* prefixes, int64_t batch, int64_t heads,
                              int64_t key_heads, int64_t size, void* out, float* sums) {
    Sequences sequences{starts, parents, prefixes, batch};
    Shape shape{heads, key_heads, size};
    if (half)
        Attention<bf16>{(const bf16*)q, (const bf16*)k, (const bf16*)v, sequences, shape, (bf16*)out, sums}.run();
    else
        Attention<float>{(const float*)q, (const float*)k, (const float*)v, sequences, shape, (float*)out, sums}.run();
}

void siirl_training_attention_gradient(int half, const void* q, const void* k, const void* v, const int64_t* starts,
                                       const int64_t* parents, const int64_t* prefixes, int64_t batch, int64_t heads,
                                       int64_t key_heads, int64_t size, const void* out, const float* sums,
                                       const void* grad, void* grad_q, void* grad_k, void* grad_v) {
    Sequences sequences{starts, parents, prefixes, batch};
    Shape shape{heads, key_heads, size};
    if (half)
        Attention<bf16>{(const bf16*)q, (const bf16*)k,  (const bf16*)v, sequences,     shape,         (bf16*)out,
                        (float*)sums,   (const bf16*)grad, (bf16*)grad_q,  (bf16*)grad_k, (bf16*)grad_v}
            .run();
    else
        Attention<float>{(const float*)q, (const float*)k,    (const float*)v, sequences,      shape,         (float*)out,
                         (float*)sums,    (const float*)grad, (float*)grad_q,  (float*)grad_k, (float*)grad_v}
            .run();
}
}
