// Sixteen floats at a time, in the compilers' portable vectors: one register with AVX-512, two or four elsewhere.
//
// Every sum of products in these kernels has one order of additions, whatever is computed beside it: element i goes to
// lane i % 16, lanes add up by halves. Tails run through the very same operations on lanes filled with a neutral value,
// so a result depends on its own row alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace siirl {

constexpr int LANES = 16;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
struct bf16 {
    uint16_t bits;
};

inline vec splat(float x) { return x - vec{}; }

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vec load(const bf16* p) {
    hvec half;
    std::memcpy(&half, p, sizeof half);
    return (vec)(__builtin_convertvector(half, uvec) << 16);
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN. Numbers below the normal ones may become 0.
#ifdef __AVX512BF16__
inline void store(bf16* p, vec v) {
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, sizeof half);
}
#else
inline void store(bf16* p, vec v) {
    uvec bits = (uvec)v;
    uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uvec nan = (uvec)(v != v);
    hvec half = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), hvec);
    std::memcpy(p, &half, sizeof half);
}
#endif

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// The first n < 16 elements, the other lanes `fill`.
template <class E>
inline vec load_part(const E* p, int64_t n, float fill = 0.0f) {
    E padded[LANES];
    float lanes[LANES];
    std::memcpy(padded, p, n * sizeof(E));
    for (int i = 0; i < LANES; i++) lanes[i] = i < n ? widen(padded[i]) : fill;
    return load(lanes);
}

#ifdef __AVX512F__
inline vec load_part(const float* p, int64_t n, float fill = 0.0f) {
    return (vec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p);
}
#endif

template <class E>
inline void store_part(E* p, vec v, int64_t n) {
    E whole[LANES];
    store(whole, v);
    std::memcpy(p, whole, n * sizeof(E));
}

template <class E>
inline vec load_upto(const E* p, int64_t n, float fill = 0.0f) {
    return n >= LANES ? load(p) : load_part(p, n, fill);
}

template <class E>
inline void store_upto(E* p, vec v, int64_t n) {
    if (n >= LANES)
        store(p, v);
    else
        store_part(p, v, n);
}

// Exchange bit `b` of the row number with bit `b` of the lane number, for rows i and i + 2^b.
#define SIIRL_LOW_8(X, Y) __builtin_shufflevector(X, Y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define SIIRL_HIGH_8(X, Y) __builtin_shufflevector(X, Y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define SIIRL_LOW_4(X, Y) __builtin_shufflevector(X, Y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define SIIRL_HIGH_4(X, Y) __builtin_shufflevector(X, Y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define SIIRL_LOW_2(X, Y) __builtin_shufflevector(X, Y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define SIIRL_HIGH_2(X, Y) __builtin_shufflevector(X, Y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define SIIRL_LOW_1(X, Y) __builtin_shufflevector(X, Y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define SIIRL_HIGH_1(X, Y) __builtin_shufflevector(X, Y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)

// Lane l of the result is the sum of the lanes of a[l]: sixteen reductions in fifteen additions.
inline vec sums(const vec (&a)[LANES]) {
    vec b[8], c[4], d[2];
    for (int i = 0; i < 8; i++) b[i] = SIIRL_LOW_8(a[i], a[i + 8]) + SIIRL_HIGH_8(a[i], a[i + 8]);
    for (int i = 0; i < 4; i++) c[i] = SIIRL_LOW_4(b[i], b[i + 4]) + SIIRL_HIGH_4(b[i], b[i + 4]);
    for (int i = 0; i < 2; i++) d[i] = SIIRL_LOW_2(c[i], c[i + 2]) + SIIRL_HIGH_2(c[i], c[i + 2]);
    return SIIRL_LOW_1(d[0], d[1]) + SIIRL_HIGH_1(d[0], d[1]);
}

inline void transpose(vec (&a)[LANES]) {
    vec b[LANES];
    for (int i = 0; i < 8; i++) b[i] = SIIRL_LOW_8(a[i], a[i + 8]), b[i + 8] = SIIRL_HIGH_8(a[i], a[i + 8]);
    for (int j = 0; j < 16; j += 8)
        for (int i = j; i < j + 4; i++) a[i] = SIIRL_LOW_4(b[i], b[i + 4]), a[i + 4] = SIIRL_HIGH_4(b[i], b[i + 4]);
    for (int j = 0; j < 16; j += 4)
        for (int i = j; i < j + 2; i++) b[i] = SIIRL_LOW_2(a[i], a[i + 2]), b[i + 2] = SIIRL_HIGH_2(a[i], a[i + 2]);
    for (int i = 0; i < 16; i += 2) a[i] = SIIRL_LOW_1(b[i], b[i + 1]), a[i + 1] = SIIRL_HIGH_1(b[i], b[i + 1]);
}

// The same halves as `sums`.
inline float sum(vec v) {
    v += SIIRL_HIGH_8(v, v);
    v += SIIRL_HIGH_4(v, v);
    v += SIIRL_HIGH_2(v, v);
    v += SIIRL_HIGH_1(v, v);
    return v[0];
}

inline vec larger(vec a, vec b) { return a > b ? a : b; }

inline float largest(vec v) {
    v = larger(v, SIIRL_HIGH_8(v, v));
    v = larger(v, SIIRL_HIGH_4(v, v));
    v = larger(v, SIIRL_HIGH_2(v, v));
    v = larger(v, SIIRL_HIGH_1(v, v));
    return v[0];
}

// exp by Cody-Waite reduction and the polynomial of Cephes' expf, about 1 ulp; 0 below -86.5, where floats end.
inline vec exp(vec x) {
    const vec magic = splat(12582912.0f);  // adding it rounds to an integer
    vec inside = x > 88.0f ? splat(88.0f) : x;
    inside = inside < -86.5f ? splat(-86.5f) : inside;
    vec n = (inside * 1.44269504088896341f + magic) - magic;
    vec r = inside - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r;
    p = p + 1.0f;
    vec scaled = (vec)((ivec)p + (__builtin_convertvector(n, ivec) << 23));
    scaled = x < -86.5f ? vec{} : scaled;
    return x != x ? x : scaled;
}

}  // namespace siirl
