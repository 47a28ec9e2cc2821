/* Small operators that each make one pass over memory, and linear layers with LoRA in bf16 (see kernels.py).
 *
 * Rows are computed in fp32 and rounded once, when they are stored. Vectors are GCC vector extensions, 16 lanes wide on
 * any processor. This file includes itself, once for each type.
 */
#ifndef T

#include <stdint.h>
#include <string.h>

#define LANES 16

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t half __attribute__((vector_size(2 * LANES)));

static inline vec load_f32(const float *p) { vec x; memcpy(&x, p, sizeof x); return x; }
static inline void store_f32(float *p, vec x) { memcpy(p, &x, sizeof x); }

/* bf16 is the upper half of fp32. */
static inline vec load_bf16(const uint16_t *p) {
    half x;
    memcpy(&x, p, sizeof x);
    return (vec)(__builtin_convertvector(x, bits) << 16);
}

/* Rounds to nearest, ties to even. NaN stays NaN, since NaNs produced by arithmetic have zeros in the lower half. */
static inline void store_bf16(uint16_t *p, vec x) {
    bits b = (bits)x;
    half y = __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, half);
    memcpy(p, &y, sizeof y);
}

static inline vec choose(ints where, vec a, vec b) { return (vec)((where & (ints)a) | (~where & (ints)b)); }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float sum(vec x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

static inline float greatest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* e^x with an error of up to 2e-7, infinity above 88, and at least e^-87: 2^n e^f with integer n and |f| <= ln 2 / 2, using the
 * Taylor series of e^f up to f^7. */
static inline vec vexp(vec x) {
    ints large = x > 88;
    x = choose(x < -87, (vec){0} - 87, x); /* keeps NaN, which is not less */
    x = choose(large, (vec){0}, x);
    vec n = x * 1.44269504f + 12582912 - 12582912; /* rounds to an integer: fp32 has no fraction bits there */
    vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec e = f * (1.0f / 5040) + 1.0f / 720;
    e = e * f + 1.0f / 120;
    e = e * f + 1.0f / 24;
    e = e * f + 1.0f / 6;
    e = e * f + 0.5f;
    e = e * f + 1;
    e = e * f + 1;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return choose(large, (vec){0} + __builtin_inff(), e * (vec)power);
}

static inline vec sigmoid(vec x) { return 1 / (1 + vexp(-x)); }

/* Parts of attention that compute in fp32 for any type of tensor. */

#define KEYS 8 /* number of keys multiplied at once */
#define FULL(n) (((n) + KEYS - 1) / KEYS * KEYS)

/* The lanes whose bit is set. */
static inline ints seeing(uint16_t bit) {
    static const ints of_lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (of_lane & (int32_t)bit) != 0;
}

/* scores (n) = factor * (sum over j of k (n, d) times lanes (d)); n is rounded up to whole groups of keys. */
static void dots(const float *k, const vec *lanes, vec *scores, int64_t n, int64_t d, float factor) {
    for (int64_t i = 0; i < n; i += KEYS) {
        vec acc[KEYS] = {0};
        for (int64_t j = 0; j < d; j++)
#pragma GCC unroll 8
            for (int p = 0; p < KEYS; p++) acc[p] += lanes[j] * k[(i + p) * d + j];
        for (int p = 0; p < KEYS; p++) scores[i + p] = acc[p] * factor;
    }
}

/* lanes (d) = sum over i of v (n, d) times weights (n); d is a multiple of KEYS. */
static void mix(const float *v, const vec *weights, vec *lanes, int64_t n, int64_t d) {
    for (int64_t j = 0; j < d; j += KEYS) {
        vec acc[KEYS] = {0};
        for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 8
            for (int p = 0; p < KEYS; p++) acc[p] += weights[i] * v[i * d + j + p];
        for (int p = 0; p < KEYS; p++) lanes[j + p] = acc[p];
    }
}

/* Adds, to each row which[i] of `to` (rows `step` apart), the sum over lanes of weights[i] times the rows of x (LANES, d). */
static void spread(const vec *restrict weights, const float *restrict x, const int32_t *restrict which, float *restrict to,
                   int64_t step, int64_t n, int64_t d) {
    for (int64_t j = 0; j < d; j += LANES) {
        vec rows[LANES];
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) rows[lane] = load_f32(x + lane * d + j);
        for (int64_t i = 0; i < n; i++) {
            const float *weight = (const float *)(weights + i);
            float *at = to + which[i] * step + j;
            vec even = load_f32(at), odd = {0};
#pragma GCC unroll 8
            for (int lane = 0; lane < LANES; lane += 2) {
                even += rows[lane] * weight[lane];
                odd += rows[lane + 1] * weight[lane + 1];
            }
            store_f32(at, even + odd);
        }
    }
}

struct normal {
    vec most, share;
};

/* Replaces scores by e^(score - the lane's maximum), or by 0 where a lane does not see the key. */
static struct normal softmax(vec *scores, const uint16_t *seen, int64_t n) {
    struct normal by = {(vec){0} - 1e30f, {0}};
    for (int64_t i = 0; i < n; i++) {
        vec score = choose(seeing(seen[i]), scores[i], (vec){0} - 1e30f);
        by.most = choose(score > by.most, score, by.most);
    }
    for (int64_t i = 0; i < n; i++) {
        scores[i] = choose(seeing(seen[i]), vexp(scores[i] - by.most), (vec){0});
        by.share += scores[i];
    }
    by.share = 1 / choose(by.share > 0, by.share, (vec){0} + 1); /* lanes without a query see nothing */
    return by;
}

/* Dot products of bf16 pairs, on processors that have them: two numbers that are multiplied and summed in one step share a lane,
 * either two columns of a row, or two rows. */

#ifdef __AVX512BF16__
#include <immintrin.h>

#define COLUMNS 32 /* of bf16, in one vector */

static inline __m512i all_lanes(const void *pair) { int x; memcpy(&x, pair, sizeof x); return _mm512_set1_epi32(x); }
static inline __m512i all_lanes_64(const void *two) { int64_t x; memcpy(&x, two, sizeof x); return _mm512_set1_epi64(x); }
static inline __m512 madd(__m512 to, __m512i a, __m512i b) { return _mm512_dpbf16_ps(to, (__m512bh)a, (__m512bh)b); }

/* Interleaves two rows of COLUMNS numbers, so that those of a column share a lane; `rounded` makes a row of two vectors. */
static inline void interleave(__m512i first, __m512i second, __m512i *to) {
    /* each lane holds its own index in `first` and, plus 0x20, that in `second` */
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i twice = _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
    const __m512i places = _mm512_add_epi32(twice, _mm512_set1_epi32(0x00200000));
    to[0] = _mm512_permutex2var_epi16(first, places, second);
    to[1] = _mm512_permutex2var_epi16(first, _mm512_add_epi32(places, _mm512_set1_epi32(0x00100010)), second);
}

static inline __m512i rounded(const __m512 *sums) { return (__m512i)_mm512_cvtne2ps_pbh(sums[1], sums[0]); }

/* Transposes vectors of 64-bit numbers: r[4 i] and r[4 i + 1] receive elements 2 i and 2 i + 1 of t[0], t[2], .., and the
 * next two those of t[1], t[3], .. */
static inline void transpose_64(const __m512i t[LANES], __m512i r[LANES]) {
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

static void transpose(__m512i r[LANES]) {
    __m512i t[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    transpose_64(t, r);
}

/* Attention with bf16 pairs: like `dots`, `mix` and `spread` above, but weights are rounded to bf16 before they are multiplied. */

/* Copies rows of x, `step` apart and selected by `which`, padded with zeros to whole groups of keys. */
static void gather(const uint16_t *x, int64_t step, const int32_t *which, int64_t n, int64_t d, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) memcpy(to + i * d, x + which[i] * step, d * sizeof *to);
    memset(to + n * d, 0, (FULL(n) - n) * d * sizeof *to);
}

/* Interleaves two rows (d); the second may be null, for zeros. */
static inline void interleave_rows(const uint16_t *first, const uint16_t *second, int64_t d, __m512i *to) {
    for (int64_t j = 0; j < d; j += COLUMNS, to += 2)
        interleave(_mm512_loadu_si512(first + j), second ? _mm512_loadu_si512(second + j) : _mm512_setzero_si512(), to);
}

/* Like `gather`, with each two rows interleaved, and padded only to a whole pair. */
static void gather_pairs(const uint16_t *x, int64_t step, const int32_t *which, int64_t n, int64_t d, __m512i *to) {
    for (int64_t i = 0; i < n; i += 2, to += d / LANES)
        interleave_rows(x + which[i] * step, i + 1 < n ? x + which[i + 1] * step : 0, d, to);
}

/* Interleaves each two of `count` rows, padded with zeros to LANES. */
static void pair_rows(const uint16_t *const *rows, int count, int64_t d, __m512i *to) {
    for (int lane = 0; lane < count; lane += 2, to += d / LANES)
        interleave_rows(rows[lane], lane + 1 < count ? rows[lane + 1] : 0, d, to);
    memset(to, 0, (LANES - count) / 2 * (d / LANES) * sizeof *to);
}

/* Transposes `count` rows into vectors (d / 2) with one row per lane, two columns at a time. */
static void pairs_to_lanes(const uint16_t *const *rows, int count, int64_t d, __m512i *to) {
    for (int64_t j = 0; j < d; j += COLUMNS, to += LANES) {
        for (int lane = 0; lane < LANES; lane++)
            to[lane] = lane < count ? _mm512_loadu_si512(rows[lane] + j) : _mm512_setzero_si512();
        transpose(to);
    }
}

/* The inverse of `pairs_to_lanes`, for vectors (d) in fp32, times a factor per lane. */
static void rows_from_lanes(const vec *x, int count, int64_t d, vec factor, uint16_t *const *rows) {
    for (int64_t j = 0; j < d; j += LANES) {
        __m512i square[LANES];
        for (int i = 0; i < LANES; i++) square[i] = (__m512i)(x[j + i] * factor);
        transpose(square);
        for (int lane = 0; lane < count; lane++) store_bf16(rows[lane] + j, (vec)square[lane]);
    }
}

static void dots_of_pairs(const uint16_t *k, const __m512i *lanes, vec *scores, int64_t n, int64_t d, float factor) {
    for (int64_t i = 0; i < n; i += KEYS) {
        __m512 acc[KEYS];
#pragma GCC unroll 8
        for (int p = 0; p < KEYS; p++) acc[p] = _mm512_setzero_ps();
        for (int64_t j = 0; j < d; j += 2)
#pragma GCC unroll 8
            for (int p = 0; p < KEYS; p++) acc[p] = madd(acc[p], lanes[j / 2], all_lanes(k + (i + p) * d + j));
        for (int p = 0; p < KEYS; p++) scores[i + p] = (vec)acc[p] * factor;
    }
}

/* Here v is interleaved, and the weights, of which there is one more, are replaced by pairs of theirs. */
static void mix_of_pairs(const __m512i *v, vec *weights, vec *lanes, int64_t n, int64_t d) {
    __m512i *pairs = (__m512i *)weights;
    if (n % 2) weights[n] = (vec){0};
    for (int64_t i = 0; i < n; i += 2) {
        __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weights[i]));
        __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weights[i + 1]));
        pairs[i / 2] = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    }
    for (int64_t j = 0; j < d; j += KEYS) {
        __m512 acc[KEYS];
#pragma GCC unroll 8
        for (int p = 0; p < KEYS; p++) acc[p] = _mm512_setzero_ps();
        for (int64_t i = 0; i < n; i += 2) {
            const uint32_t *row = (const uint32_t *)v + i / 2 * d + j;
#pragma GCC unroll 8
            for (int p = 0; p < KEYS; p++) acc[p] = madd(acc[p], pairs[i / 2], all_lanes(row + p));
        }
        for (int p = 0; p < KEYS; p++) lanes[j + p] = (vec)acc[p];
    }
}

/* Here x (LANES, d) is interleaved. */
static void spread_of_pairs(const vec *weights, const __m512i *x, const int32_t *which, float *to, int64_t step, int64_t n,
                            int64_t d) {
    for (int64_t j = 0; j < d / LANES; j++) {
        __m512i rows[LANES / 2];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) rows[i] = x[i * (d / LANES) + j];
        for (int64_t i = 0; i < n; i++) {
            uint16_t pairs[LANES];
            _mm256_storeu_si256((__m256i *)pairs, (__m256i)_mm512_cvtneps_pbh((__m512)weights[i]));
            float *at = to + which[i] * step + j * LANES;
            __m512 even = _mm512_loadu_ps(at), odd = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int p = 0; p < LANES / 2; p += 2) {
                even = madd(even, all_lanes(pairs + 2 * p), rows[p]);
                odd = madd(odd, all_lanes(pairs + 2 * p + 2), rows[p + 1]);
            }
            _mm512_storeu_ps(at, _mm512_add_ps(even, odd));
        }
    }
}
#endif

/* A linear layer with LoRA in bf16 (arXiv:2106.09685, eq. 3), for processors with dot products of bf16 pairs; not for those with
 * matrix units (AMX), which oneDNN uses well. */

#if defined __AVX512BF16__ && !defined __AMX_BF16__
#define FEW 8 /* in thin products: the number of rows or columns that share each load of the other operand */

/* The start of a thread's share of n, as a multiple of `of`. */
static inline int64_t share_of(int64_t n, int64_t of, int thread, int threads) {
    int64_t whole = (n + of - 1) / of * thread / threads * of;
    return whole < n ? whole : n;
}

/* Products of n rows, TILE at a time, with weights: PANEL columns at a time are packed in the order in which they are multiplied,
 * and stay in cache for all rows, while the next ones are prefetched from memory. */

#define TILE 6
#define PANEL 64
#define VECTORS (PANEL / LANES)
#define DEPTH 4096 /* length of the sums that are packed at once, */
#define PIECES 64  /* and the maximum number of parts that these come from */

/* A quantised weight (bases/quant.py) with rows of `width` numbers: byte codes with a scale for each row; or two codes per byte
 * (NF4), which select levels between minus and plus the absmax of their 64 numbers. With `halves`, byte codes have an fp16 scale
 * per 32 numbers; two codes per byte have a scale and a minimum per 32 << shared numbers, and codes for these per 32. */
struct packed {
    const uint8_t *codes, *absmax;
    const float *scales, *map, *levels; /* NF4: scales of 256 absmax each, values of absmax codes, the 16 levels */
    const uint16_t *halves, *minima;
    const uint8_t *scale_codes, *minimum_codes; /* null: all are 1 */
    float offset;
    int32_t bits;
    int64_t width, shared;
};

/* One summand x W: the rows of x (n, k) lie `step` apart. Either the rows of W (k, d) lie `down` apart, `across` is 1 and k is
 * even; or its columns lie `across` apart, `down` is 1 and k is a multiple of 32; d always is. With `packed`, W is quantised. The
 * summand only applies to the rows begin .. end - 1. */
struct part {
    const uint16_t *x, *w;
    const struct packed *packed;
    int64_t step, k, down, across, begin, end;
};

/* y (n, d) = start + the sum of some parts: those whose k is a multiple of 32 come first, so that they are only split at such
 * multiples. The rows of `start`, which may be null, lie start_step apart: 0 for a bias. */
struct sum {
    const struct part *parts;
    uint16_t *y;
    const uint16_t *start;
    int64_t count, d, start_step;
};

/* Dequantises 32 numbers of a row, from `column` on, rounding as PyTorch does. */
static inline __m512i from_8_bits(const struct packed *w, int64_t row, int64_t column) {
    const __m128i *codes = (const __m128i *)(w->codes + row * w->width + column);
    float by = w->halves ? _cvtsh_ss(w->halves[(row * w->width + column) / 32]) : w->scales[row];
    __m512 scale = _mm512_set1_ps(by), wide[2];
    for (int i = 0; i < 2; i++)
        wide[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + i))), scale);
    return rounded(wide);
}

/* Looks up 32 numbers by their 4-bit codes, among 16 values. */
static inline __m512i of_values(const uint8_t *codes, __m512 values) {
    /* twice: indices have 5 bits, and the fifth belongs to another code */
    __m512i twice = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16)), twice);
}

static inline __m512i from_4_bits(const struct packed *w, int64_t row, int64_t column) {
    int64_t at = row * w->width + column, block = at / 64;
    float most = w->map[w->absmax[block]] * w->scales[block / 256];
    __asm__("" : "+x"(most)); /* prevents a fused multiply-add with the sum, which would round differently */
    return of_values(w->codes + at / 2, _mm512_mul_ps(_mm512_loadu_ps(w->levels), _mm512_set1_ps(most + w->offset)));
}

static inline __m512i from_4_bits_and_minimum(const struct packed *w, int64_t row, int64_t column) {
    int64_t at = row * w->width + column, block = at / 32, of = block >> w->shared;
    float scale = _cvtsh_ss(w->halves[of]), minimum = _cvtsh_ss(w->minima[of]);
    if (w->scale_codes) scale *= w->scale_codes[block];
    if (w->minimum_codes) minimum *= w->minimum_codes[block];
    __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); /* their products are exact */
    return of_values(w->codes + at / 2, _mm512_fmadd_ps(codes, _mm512_set1_ps(scale), _mm512_set1_ps(minimum)));
}

/* Packs rows k .. k + count - 1 of a part's W (k, d), in the panel starting at column j, into `to` (count / 2, VECTORS).
 * `load(row, column)` returns 32 contiguous numbers of W or its transpose, whichever stores them contiguously. */
#define IN_PANEL(load)                                                                                   \
    int64_t width = least(PANEL, d - j);                                                                 \
    if (of->across == 1) {                                                                               \
        for (int64_t i = 0; i < count; i += 2)                                                           \
            for (int64_t c = 0; c < width; c += COLUMNS)                                                 \
                interleave(load(k + i, j + c), load(k + i + 1, j + c), to + i / 2 * VECTORS + c / LANES); \
        return;                                                                                          \
    }                                                                                                    \
    for (int64_t c = 0; c < width; c += LANES)                                                           \
        for (int64_t i = 0; i < count; i += 2 * LANES) {                                                 \
            __m512i square[LANES];                                                                       \
            _Pragma("GCC unroll 16") for (int p = 0; p < LANES; p++) square[p] = load(j + c + p, k + i);  \
            transpose(square);                                                                           \
            _Pragma("GCC unroll 16") for (int p = 0; p < LANES; p++)                                      \
                to[(i / 2 + p) * VECTORS + c / LANES] = square[p];                                       \
        }

static void in_panel(const struct part *of, int64_t k, int64_t count, int64_t j, int64_t d, __m512i *to) {
    int64_t step = of->across == 1 ? of->down : of->across;
#define PLAIN(row, column) _mm512_loadu_si512(of->w + (row) * step + (column))
    IN_PANEL(PLAIN)
#undef PLAIN
}

static void in_panel_from_8_bits(const struct part *of, int64_t k, int64_t count, int64_t j, int64_t d, __m512i *to) {
#define OF_8_BITS(row, column) from_8_bits(of->packed, row, column)
    IN_PANEL(OF_8_BITS)
#undef OF_8_BITS
}

static void in_panel_from_4_bits(const struct part *of, int64_t k, int64_t count, int64_t j, int64_t d, __m512i *to) {
#define OF_4_BITS(row, column) from_4_bits(of->packed, row, column)
    IN_PANEL(OF_4_BITS)
#undef OF_4_BITS
}

static void in_panel_with_minimum(const struct part *of, int64_t k, int64_t count, int64_t j, int64_t d, __m512i *to) {
#define OF_4_BITS(row, column) from_4_bits_and_minimum(of->packed, row, column)
    IN_PANEL(OF_4_BITS)
#undef OF_4_BITS
}

static void in_panel_of(const struct part *of, int64_t k, int64_t count, int64_t j, int64_t d, __m512i *to) {
    const struct packed *w = of->packed;
    if (!w) in_panel(of, k, count, j, d, to);
    else if (w->bits == 8) in_panel_from_8_bits(of, k, count, j, d, to);
    else if (w->minima) in_panel_with_minimum(of, k, count, j, d, to);
    else in_panel_from_4_bits(of, k, count, j, d, to);
}

/* Prefetches a share of the panel starting at column j: prefetching all of it at once would stall. */
static void ask_for(const struct part *of, int64_t j, int64_t d, int64_t turn, int64_t turns) {
    int64_t width = least(PANEL, d - j), rows = of->across == 1 ? of->k : width, length = of->across == 1 ? width : of->k;
    int64_t step = of->across == 1 ? of->down : of->across, bits = of->packed ? of->packed->bits : 16;
    int64_t lines = (length * bits / 8 + 63) / 64;
    const uint8_t *w = of->packed ? of->packed->codes : (const uint8_t *)of->w;
    for (int64_t line = rows * lines * turn / turns; line < rows * lines * (turn + 1) / turns; line++)
        _mm_prefetch(w + (line / lines * step + j * of->across) * bits / 8 + line % lines * 64, _MM_HINT_T1);
}

static inline __attribute__((always_inline)) void add_up(const uint16_t *const *row, const __m512i *panel, int64_t pairs,
                                                         __m512 sums[TILE][VECTORS]) {
    for (int64_t p = 0; p < pairs; p++, panel += VECTORS) {
#pragma GCC unroll 6
        for (int i = 0; i < TILE; i++) {
            __m512i both = all_lanes(row[i] + 2 * p);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] = madd(sums[i][v], both, panel[v]);
        }
    }
}

/* Computes the tiles begin .. end - 1 of rows in one panel, starting at column j. */
static void multiply_panel(const struct sum *sum, int64_t j, int64_t n, int64_t begin, int64_t end, __m512i *room) {
    static const uint16_t zeros[DEPTH];
    struct { const uint16_t *x; int64_t step, pairs, begin, end; } piece[PIECES];
    __m512 *kept = (__m512 *)(room + DEPTH / 2 * VECTORS);
    int64_t part = 0, k = 0;
    for (int first = 1; first || part < sum->count; first = 0) {
        int64_t pieces = 0, depth = 0;
        while (part < sum->count && depth < DEPTH && pieces < PIECES) {
            const struct part *of = sum->parts + part;
            int64_t count = least(of->k - k, DEPTH - depth);
            if (of->begin < end * TILE && of->end > begin * TILE) {
                in_panel_of(of, k, count, j, sum->d, room + depth / 2 * VECTORS);
                piece[pieces].x = of->x + k, piece[pieces].step = of->step, piece[pieces].pairs = count / 2;
                piece[pieces].begin = of->begin, piece[pieces].end = of->end;
                pieces++, depth += count;
            }
            k += count;
            if (k == of->k) part++, k = 0;
        }
        for (int64_t tile = begin; tile < end; tile++) {
            __m512 sums[TILE][VECTORS], *at = kept + (tile - begin) * TILE * VECTORS;
            const __m512i *panel = room;
#pragma GCC unroll 6
            for (int i = 0; i < TILE; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[i][v] = first ? _mm512_setzero_ps() : at[i * VECTORS + v];
            if (first && sum->start)
                for (int i = 0; i < TILE; i++) {
                    const uint16_t *start = sum->start + least(tile * TILE + i, n - 1) * sum->start_step + j;
                    for (int v = 0; v < VECTORS && j + v * LANES < sum->d; v++)
                        sums[i][v] = (__m512)load_bf16(start + v * LANES);
                }
            if (first && j + PANEL < sum->d)
                for (int64_t p = 0; p < sum->count; p++)
                    ask_for(sum->parts + p, j + PANEL, sum->d, tile - begin, end - begin);
            for (int64_t p = 0; p < pieces; panel += piece[p].pairs * VECTORS, p++) {
                if (tile * TILE >= piece[p].end || (tile + 1) * TILE <= piece[p].begin) continue;
                const uint16_t *row[TILE];
#pragma GCC unroll 6
                for (int i = 0; i < TILE; i++) {
                    int64_t at = least(tile * TILE + i, n - 1);
                    row[i] = at < piece[p].begin || at >= piece[p].end ? zeros : piece[p].x + at * piece[p].step;
                }
                add_up(row, panel, piece[p].pairs, sums);
            }
#pragma GCC unroll 6
            for (int i = 0; i < TILE; i++) {
                uint16_t *y = sum->y + (tile * TILE + i) * sum->d + j;
                if (part < sum->count)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) at[i * VECTORS + v] = sums[i][v];
                else if (tile * TILE + i < n)
                    for (int v = 0; v < VECTORS && j + v * LANES < sum->d; v += 2)
                        _mm512_storeu_si512(y + v * LANES, rounded(sums[i] + v));
            }
        }
    }
}

/* Computes a thread's share of some sums of n rows, such that all threads have equal numbers of tiles in panels. */
static void multiply(const struct sum *sums, int64_t count, int64_t n, int thread, int threads, __m512i *room) {
    int64_t tiles = (n + TILE - 1) / TILE, panels = 0, before = 0;
    for (int64_t i = 0; i < count; i++) panels += (sums[i].d + PANEL - 1) / PANEL;
    int64_t begin = panels * tiles * thread / threads, end = panels * tiles * (thread + 1) / threads;
    for (int64_t i = 0; i < count; before += (sums[i].d + PANEL - 1) / PANEL, i++)
        for (int64_t j = 0, at = before * tiles; j < sums[i].d; j += PANEL, at += tiles)
            if (at < end && at + tiles > begin)
                multiply_panel(sums + i, j, n, at < begin ? begin - at : 0, least(tiles, end - at), room);
}

/* The first row of a thread's share of n rows, within those of a run, of[0] .. of[1] - 1; at an even offset in the run. */
static inline int64_t begin_in(const int64_t *of, int64_t n, int thread, int threads) {
    int64_t before = n * thread / threads - of[0], count = of[1] - of[0];
    return of[0] + (before <= 0 ? 0 : before < count ? before / 2 * 2 : count);
}

/* h (n, r) = x (n, d) a^T for up to 16 rows of a (r, d); the rows of h lie `step` apart. Each lane handles a row of a; with
 * `fold` 2, two lanes do, each for every other pair of columns. */
static inline __attribute__((always_inline)) void down_some(const uint16_t *x, const uint16_t *a, uint16_t *h, int64_t n,
                                                            int64_t d, int64_t r, int64_t step, const int fold, __m512i *room) {
    int64_t count = d / 2 / fold;
    for (int64_t p = 0; p < count; p += LANES) {
        __m512i of[LANES], at[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            const uint16_t *from = a + (i / fold < r ? i / fold : 0) * d + 2 * fold * p + i % fold * COLUMNS;
            of[i] = fold == 1 || i % 2 == 0 || p + LANES / 2 < count ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
        }
        if (fold == 2) transpose_64(of, at);
        else transpose(of);
#pragma GCC unroll 16
        for (int q = 0; q < LANES; q++) room[p + q] = fold == 2 ? at[q % 8 / 2 * 4 + q / 8 * 2 + q % 2] : of[q];
    }
    for (int64_t t = 0; t < n; t += FEW) {
        const uint16_t *row[FEW];
        __m512 sums[FEW];
#pragma GCC unroll 8
        for (int i = 0; i < FEW; i++) row[i] = x + least(t + i, n - 1) * d, sums[i] = _mm512_setzero_ps();
        for (int64_t p = 0; p < count; p++) {
#pragma GCC unroll 8
            for (int i = 0; i < FEW; i++) {
                const uint16_t *pairs = row[i] + 2 * fold * p;
                sums[i] = madd(sums[i], fold == 2 ? all_lanes_64(pairs) : all_lanes(pairs), room[p]);
            }
        }
        for (int i = 0; i < FEW && t + i < n; i++) {
            __m512 s = sums[i];
            if (fold == 2) s = _mm512_maskz_compress_ps(0x5555, _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1)));
            _mm256_mask_storeu_epi16(h + (t + i) * step, (1 << r) - 1, (__m256i)_mm512_cvtneps_pbh(s));
        }
    }
}

/* h (n, r) = x (n, d) a^T for a (r, d); the rows of h lie `step` apart. */
static void down(const uint16_t *x, const uint16_t *a, uint16_t *h, int64_t n, int64_t d, int64_t r, int64_t step,
                 __m512i *room) {
    for (int64_t k = 0; k < r; k += LANES)
        if (2 * (r - k) <= LANES) down_some(x, a + k * d, h + k, n, d, r - k, step, 2, room);
        else down_some(x, a + k * d, h + k, n, d, least(r - k, LANES), step, 1, room);
}

/* Interleaves rows t and t + 1 of h (n, r), so that the two numbers of a column are adjacent. */
static void in_pairs(const uint16_t *h, uint16_t *pairs, int64_t n, int64_t r) {
    for (int64_t t = 0; t < n; t += 2)
        for (int64_t k = 0; k < r; k++) {
            pairs[t * r + 2 * k] = h[t * r + k];
            pairs[t * r + 2 * k + 1] = t + 1 < n ? h[(t + 1) * r + k] : 0;
        }
}

/* w (r, d) = h^T x in the columns begin .. end - 1, given the row pairs of h, `step` apart, and x (n, d). Reads up to FEW pairs
 * beyond those of h. */
static void outer(const uint16_t *pairs, const uint16_t *x, uint16_t *w, int64_t n, int64_t d, int64_t r, int64_t step,
                  int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += COLUMNS)
        for (int64_t k = 0; k < r; k += FEW) {
            __m512 sums[FEW][2];
#pragma GCC unroll 8
            for (int i = 0; i < FEW; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
            for (int64_t t = 0; t < n; t += 2) {
                __m512i both[2], second = _mm512_setzero_si512();
                const uint16_t *row = x + t * d + j;
                _mm_prefetch(row + COLUMNS, _MM_HINT_T0);
                _mm_prefetch(row + d + COLUMNS, _MM_HINT_T0);
                if (t + 1 < n) second = _mm512_loadu_si512(row + d);
                interleave(_mm512_loadu_si512(row), second, both);
#pragma GCC unroll 8
                for (int i = 0; i < FEW; i++) {
                    __m512i pair = all_lanes(pairs + t * step + 2 * (k + i));
                    sums[i][0] = madd(sums[i][0], pair, both[0]);
                    sums[i][1] = madd(sums[i][1], pair, both[1]);
                }
            }
            for (int i = 0; i < FEW && k + i < r; i++) _mm512_storeu_si512(w + (k + i) * d + j, rounded(sums[i]));
        }
}

/* y (n, d) = start + x (n, k) W, with W as in `struct part` and start as in `struct sum`. */
void product_bf16(const uint16_t *x, const uint16_t *w, const struct packed *packed, const uint16_t *start, uint16_t *y,
                  int64_t n, int64_t k, int64_t d, int64_t start_step, int64_t down, int64_t across, vec *room,
                  int64_t room_each, int threads) {
    struct part part = {x, w, packed, k, k, down, across, 0, n};
    struct sum sum = {&part, y, start, 1, d, start_step};
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        multiply(&sum, 1, n, thread, threads, (__m512i *)(room + thread * room_each));
}

/* Linear layers with the adapters of some runs; run q has the rows rows[q] .. rows[q + 1] - 1. For its A (R, d), h = z A^T is
 * (.., R), and y_i (n, widths[i]) = x W_i^T + bias_i + h_i B_i, for the columns h_i of h and its B_i (ranks[q, i], widths[i]);
 * z is x (n, d), or x after dropout. The rows of h lie `step` apart. Element (i, j) of W_i is w[i][i * across + j * down], as in
 * `struct part`. A bias may be null, and a rank 0. Each thread has room_each vectors of `room`. */
void lora_bf16(const uint16_t *x, const uint16_t *z, uint16_t *const *w, struct packed *const *packed,
               uint16_t *const *bias, uint16_t *const *a, uint16_t *const *b, uint16_t *h, uint16_t *const *y,
               const int64_t *ranks, const int64_t *rows, const int64_t *widths, const int64_t *down_steps,
               const int64_t *across_steps, int64_t count, int64_t runs, int64_t step, int64_t n, int64_t d, vec *room,
               int64_t room_each, int threads) {
    struct part parts[count][1 + runs];
    struct sum sums[count];
    int64_t rank[runs]; /* R of each run */
    for (int64_t q = 0; q < runs; q++) rank[q] = 0;
    for (int64_t i = 0; i < count; i++) {
        parts[i][0] = (struct part){x, w[i], packed[i], d, d, down_steps[i], across_steps[i], 0, n};
        for (int64_t q = 0; q < runs; q++) {
            int64_t at = q * count + i;
            parts[i][1 + q] = (struct part){h + rank[q], b[at], 0, step, ranks[at], widths[i], 1, rows[q], rows[q + 1]};
            rank[q] += ranks[at];
        }
        sums[i] = (struct sum){parts[i], y[i], bias[i], 1 + runs, widths[i], 0};
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
            for (int64_t q = 0; q < runs; q++) {
                int64_t at = begin_in(rows + q, n, thread, threads), some = begin_in(rows + q, n, thread + 1, threads) - at;
                if (some)
                    down(z + at * d, a[q], h + at * step, some, d, rank[q], step, (__m512i *)(room + thread * room_each));
            }
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
            multiply(sums, count, n, thread, threads, (__m512i *)(room + thread * room_each));
    }
}

/* Gradients of lora_bf16, given the gradients g_i of y_i. For the rows of each run: of_h = g_i B_i^T, of_a = of_h^T z,
 * of_b_i = h_i^T g_i and, unless null, of_x (n, d) = g_i W_i + of_h A; if of_z is given, of_h A is stored there instead. Row
 * pairs are stored in `pairs` and `of_pairs`, which have one more row for each run. */
void lora_back_bf16(uint16_t *const *g, const uint16_t *z, const uint16_t *h, uint16_t *const *w,
                    struct packed *const *packed, uint16_t *const *a, uint16_t *const *b, uint16_t *of_h, uint16_t *of_x,
                    uint16_t *of_z, uint16_t *const *of_a, uint16_t *const *of_b, uint16_t *pairs, uint16_t *of_pairs,
                    const int64_t *ranks, const int64_t *rows, const int64_t *widths, const int64_t *down_steps,
                    const int64_t *across_steps, int64_t count, int64_t runs, int64_t step, int64_t n, int64_t d, vec *room,
                    int64_t room_each, int threads) {
    struct part parts[count + runs];
    struct sum sums[2];
    int64_t results = 0;
    for (int64_t i = 0; i < count; i++)
        parts[i] = (struct part){g[i], w[i], packed[i], widths[i], widths[i], across_steps[i], down_steps[i], 0, n};
    for (int64_t q = 0; q < runs; q++) {
        int64_t rank = 0;
        for (int64_t i = 0; i < count; i++) rank += ranks[q * count + i];
        parts[count + q] = (struct part){of_h, a[q], 0, step, rank, d, 1, rows[q], rows[q + 1]};
    }
    if (of_z) sums[results++] = (struct sum){parts + count, of_z, 0, runs, d, 0};
    if (of_x) sums[results++] = (struct sum){parts, of_x, 0, of_z ? count : count + runs, d, 0};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++)
            for (int64_t q = 0; q < runs; q++) {
                int64_t at = begin_in(rows + q, n, thread, threads), some = begin_in(rows + q, n, thread + 1, threads) - at;
                int64_t k = 0;
                for (int64_t i = 0; some && i < count; k += ranks[q * count + i], i++)
                    down(g[i] + at * widths[i], b[q * count + i], of_h + at * step + k, some, widths[i], ranks[q * count + i],
                         step, (__m512i *)(room + thread * room_each));
                in_pairs(h + at * step, pairs + (at + q) * step, some, step);
                in_pairs(of_h + at * step, of_pairs + (at + q) * step, some, step);
            }
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            for (int64_t q = 0; q < runs; q++)
                for (int64_t i = 0, k = 0; i < count; k += ranks[q * count + i], i++) {
                    int64_t wide = widths[i], rank = ranks[q * count + i], some = rows[q + 1] - rows[q];
                    int64_t of_run = (rows[q] + q) * step + 2 * k;
                    outer(pairs + of_run, g[i] + rows[q] * wide, of_b[q * count + i], some, wide, rank, step,
                          share_of(wide, COLUMNS, thread, threads), share_of(wide, COLUMNS, thread + 1, threads));
                    outer(of_pairs + of_run, z + rows[q] * d, of_a[q] + k * d, some, d, rank, step,
                          share_of(d, COLUMNS, thread, threads), share_of(d, COLUMNS, thread + 1, threads));
                }
            multiply(sums, results, n, thread, threads, (__m512i *)(room + thread * room_each));
        }
    }
}
#endif

#define BLOCK 4 /* rows with the same low-rank update that are computed at once */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(f) PASTE(f, KIND)
#define LOAD PASTE(load, KIND)
#define STORE PASTE(store, KIND)

#define T float
#define KIND f32
#define IS_F32 1
#include "kernels.c"
#undef T
#undef KIND
#undef IS_F32

#ifdef __AVX512BF16__
/* Dot products of x (k) with four other vectors, as vectors of partial sums; pairs are summed already. */
static inline void four_dots_bf16(const uint16_t *x, const uint16_t *const *of, int64_t k, vec *sums) {
    for (int64_t j = 0; j < k; j += COLUMNS) {
        __mmask32 there = k - j < COLUMNS ? 0xffff : 0xffffffff;
        __m512i v = _mm512_maskz_loadu_epi16(there, x + j);
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sums[c] = (vec)madd((__m512)sums[c], v, _mm512_maskz_loadu_epi16(there, of[c] + j));
    }
}
#endif

#define T uint16_t
#define KIND bf16
#define IS_F32 0
#include "kernels.c"

#else

#if !defined __AVX512BF16__ || IS_F32
/* Dot products of x (k) with four other vectors, as vectors of partial sums. */
static inline void NAME(four_dots)(const T *x, const T *const *of, int64_t k, vec *sums) {
    for (int64_t j = 0; j < k; j += LANES) {
        vec v = LOAD(x + j);
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sums[c] += v * LOAD(of[c] + j);
    }
}
#endif

/* y_i += scale (x_i A^T) B for the `count` rows i in `places`, at most `few`, with A (r, k) and B (r, d). */
static inline __attribute__((always_inline)) void NAME(few_rows)(const T *x, T *y, const T *a, const T *b, const int32_t *places,
                                                                 int64_t count, int64_t r, int64_t k, int64_t d, float scale,
                                                                 const int few) {
    float h[few * r];
    for (int64_t q = 0; q < r; q += 4) {
        const T *of[4];
        for (int c = 0; c < 4; c++) of[c] = a + (q + c < r ? q + c : q) * k;
        for (int i = 0; i < few && i < count; i++) {
            vec sums[4] = {{0}};
            NAME(four_dots)(x + places[i] * k, of, k, sums);
            for (int c = 0; c < 4 && q + c < r; c++) h[i * r + q + c] = scale * sum(sums[c]);
        }
    }
    for (int64_t j = 0; j < d; j += LANES) {
        vec to[few];
#pragma GCC unroll 4
        for (int i = 0; i < few; i++) to[i] = LOAD(y + places[i < count ? i : 0] * d + j);
        for (int64_t q = 0; q < r; q++) {
            vec u = LOAD(b + q * d + j);
#pragma GCC unroll 4
            for (int i = 0; i < few; i++) to[i] += h[i * r + q] * u;
        }
        for (int i = 0; i < few && i < count; i++) STORE(y + places[i] * d + j, to[i]);
    }
}

/* Adds low-rank updates of rows x (n, k) to y (n, d), in blocks of at most BLOCK rows with the same update: block i has the
 * counts[i] rows places[BLOCK * i ..], A_i (ranks[i], k), B_i (ranks[i], d) and a scale. */
void NAME(row_updates)(const T *x, T *y, const int32_t *places, const int32_t *counts, T *const *a, T *const *b,
                       const int32_t *ranks, const float *scales, int64_t blocks, int64_t k, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < blocks; i++) {
        if (counts[i] == 1)
            NAME(few_rows)(x, y, a[i], b[i], places + BLOCK * i, 1, ranks[i], k, d, scales[i], 1);
        else
            NAME(few_rows)(x, y, a[i], b[i], places + BLOCK * i, counts[i], ranks[i], k, d, scales[i], BLOCK);
    }
}

/* The first n numbers of a vector, padded with zeros, or all of it. */
static inline vec NAME(load_some)(const T *from, int64_t n) {
    if (n >= LANES) return LOAD(from);
    T some[LANES] = {0};
    memcpy(some, from, n * sizeof(T));
    return LOAD(some);
}

static inline void NAME(store_some)(T *to, vec x, int64_t n) {
    T some[LANES];
    STORE(n >= LANES ? to : some, x);
    if (n < LANES) memcpy(to, some, n * sizeof(T));
}

/* Many matrices at once: casts[q] = scales[q] own[q] (rows[q], columns[q]), or back, own[q] = scales[q] casts[q]. Element (i, j)
 * of own[q] is at i * columns[q] + j; that of casts[q] at i * down[q] + j * across[q], where `down` or `across` is 1. */
void NAME(copy_scaled)(float *const *own, T *const *casts, const int64_t *rows, const int64_t *columns, const int64_t *down,
                       const int64_t *across, const float *scales, int64_t count, int back, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (int64_t q = 0; q < count; q++) {
        int64_t n = rows[q], d = columns[q];
        if (across[q] == 1) {
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < d; j += LANES) {
                    float *f = own[q] + i * d + j;
                    T *to = casts[q] + i * down[q] + j;
                    if (back) store_some_f32(f, NAME(load_some)(to, d - j) * scales[q], d - j);
                    else NAME(store_some)(to, load_some_f32(f, d - j) * scales[q], d - j);
                }
            continue;
        }
        for (int64_t i = 0; i < n; i += LANES) /* LANES rows, which are adjacent in a column, at once */
            for (int64_t j = 0; j < d; j++) {
                float column[LANES] = {0}, *f = own[q] + i * d + j;
                T *to = casts[q] + i + j * across[q];
                if (back) store_f32(column, NAME(load_some)(to, n - i) * scales[q]);
                for (int64_t lane = 0; lane < least(LANES, n - i); lane++)
                    if (back) f[lane * d] = column[lane];
                    else column[lane] = f[lane * d];
                if (!back) NAME(store_some)(to, load_f32(column) * scales[q], n - i);
            }
    }
}

/* y = w x f with f = 1 / sqrt(mean(x^2) + eps), for the rows of x (n, d); f (n) is stored. */
void NAME(rms_norm)(const T *x, const T *w, T *y, float *f, int64_t n, int64_t d, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        vec squares = {0};
        for (int64_t j = 0; j < d; j += LANES) { vec a = LOAD(x + i * d + j); squares += a * a; }
        f[i] = 1 / __builtin_sqrtf(sum(squares) / d + eps);
        for (int64_t j = 0; j < d; j += LANES) STORE(y + i * d + j, LOAD(x + i * d + j) * f[i] * LOAD(w + j));
    }
}

/* Gradient of rms_norm in x for the gradient g of y: f (u - f^2 x mean(u x)) with u = w g. */
void NAME(rms_norm_back)(const T *g, const T *x, const T *w, const float *f, T *out, int64_t n, int64_t d,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T *gi = g + i * d, *xi = x + i * d;
        vec products = {0};
        for (int64_t j = 0; j < d; j += LANES) products += LOAD(gi + j) * LOAD(w + j) * LOAD(xi + j);
        float c = sum(products) / d * f[i] * f[i];
        for (int64_t j = 0; j < d; j += LANES)
            STORE(out + i * d + j, (LOAD(gi + j) * LOAD(w + j) - LOAD(xi + j) * c) * f[i]);
    }
}

/* y = silu(a) b = a sigmoid(a) b, for n numbers. */
void NAME(swiglu)(const T *a, const T *b, T *y, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vec x = LOAD(a + i);
        STORE(y + i, x * sigmoid(x) * LOAD(b + i));
    }
}

/* Gradients of swiglu in a and b for the gradient g of y. */
void NAME(swiglu_back)(const T *g, const T *a, const T *b, T *of_a, T *of_b, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vec d = LOAD(g + i), x = LOAD(a + i), s = sigmoid(x);
        STORE(of_a + i, d * LOAD(b + i) * s * (1 + x * (1 - s)));
        STORE(of_b + i, d * x * s);
    }
}

/* For y = s z with rows z (n, d) and s = 1 + step (d): the gradient in z for the gradient g of y, and each column's sum(g y). */
void NAME(scaled_back)(const T *g, const T *y, const T *step, T *of_z, float *sums, int64_t n, int64_t d, int threads) {
    int64_t vectors = d / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++) { /* each part has a range of columns */
        int64_t begin = vectors * part / threads * LANES, end = vectors * (part + 1) / threads * LANES;
        for (int64_t i = 0; i < n; i += BLOCK) {
            int64_t stop = i + BLOCK < n ? i + BLOCK : n;
            for (int64_t j = begin; j < end; j += LANES) {
                vec total = load_f32(sums + j), more = LOAD(step + j);
                for (int64_t k = i; k < stop; k++) {
                    vec x = LOAD(g + k * d + j);
                    STORE(of_z + k * d + j, x + x * more);
                    total += x * LOAD(y + k * d + j);
                }
                store_f32(sums + j, total);
            }
        }
    }
}

/* y = 0.5 x (1 + tanh(u)) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), for n numbers. */
#define TWICE_U(x) ((x) * 1.59576912f * (1 + 0.044715f * (x) * (x)))

void NAME(gelu)(const T *x, T *y, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vec a = LOAD(x + i);
        STORE(y + i, a * sigmoid(TWICE_U(a)));
    }
}

/* Gradient of gelu in x for the gradient g of y. */
void NAME(gelu_back)(const T *g, const T *x, T *out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vec a = LOAD(x + i), s = sigmoid(TWICE_U(a));
        STORE(out + i, LOAD(g + i) * s * (1 + (1 - s) * a * 1.59576912f * (1 + 3 * 0.044715f * a * a)));
    }
}
#undef TWICE_U

/* Rotary positions of x (n, heads, d): (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2); with `back`, the transpose of that.
 * Rows of x lie `step` apart, and its heads d apart; y is dense; cos and sin are (n, d). */
void NAME(rotate)(const T *x, const T *cos, const T *sin, T *y, int64_t n, int64_t heads, int64_t d, int64_t step,
                  int back, int threads) {
    int64_t m = d / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T *c = cos + i * d, *s = sin + i * d;
        for (int64_t h = 0; h < heads; h++) {
            const T *xi = x + i * step + h * d;
            T *yi = y + (i * heads + h) * d;
            for (int64_t j = 0; j < m; j += LANES) {
                vec x1 = LOAD(xi + j), x2 = LOAD(xi + m + j), s1 = LOAD(s + j), s2 = LOAD(s + m + j);
                vec y1 = x1 * LOAD(c + j), y2 = x2 * LOAD(c + m + j);
                STORE(yi + j, back ? y1 + x2 * s2 : y1 - x2 * s1);
                STORE(yi + m + j, back ? y2 - x1 * s1 : y2 + x1 * s2);
            }
        }
    }
}

/* For each row of x (n, d): the maximum, the sum of e^(x - maximum), and the maximum of each `group` of numbers
 * (n, d / group). */
void NAME(log_sums)(const T *x, float *most, float *sums, T *of_groups, int64_t n, int64_t d, int64_t group, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T *row = x + i * d;
        vec largest = LOAD(row), total = {0};
        for (int64_t j = 0; j < d; j += group) {
            vec of_group = LOAD(row + j);
            for (int64_t p = LANES; p < group; p += LANES) {
                vec other = LOAD(row + j + p);
                of_group = choose(other > of_group, other, of_group);
            }
            largest = choose(of_group > largest, of_group, largest);
            T lanes[LANES];
            STORE(lanes, (vec){0} + greatest(of_group));
            of_groups[i * (d / group) + j / group] = lanes[0];
        }
        most[i] = greatest(largest);
        for (int64_t j = 0; j < d; j += LANES) total += vexp(LOAD(row + j) - most[i]);
        sums[i] = sum(total);
    }
}

/* Attention of up to LANES queries at a time, one per lane, over a list of keys. */

#if !IS_F32 && defined __AVX512BF16__
#define IN_PAIRS(d, pairs, single) do { if ((d) % COLUMNS == 0) { pairs; } else { single; } } while (0)
#else
#define IN_PAIRS(d, pairs, single) do { single; } while (0)
#endif

/* Converts rows of x (n, d), `step` apart and selected by `which`, to fp32, padded with zeros to whole groups of keys. */
static void NAME(widen)(const T *x, int64_t step, const int32_t *which, int64_t n, int64_t d, float *to) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < d; j += LANES) store_f32(to + i * d + j, LOAD(x + which[i] * step + j));
    memset(to + n * d, 0, (FULL(n) - n) * d * sizeof(float));
}

/* Transposes `count` rows into vectors (d) with one row per lane. */
static void NAME(to_lanes)(const T *const *rows, int count, int64_t d, vec *to) {
    memset(to, 0, d * sizeof(vec));
    for (int lane = 0; lane < count; lane++)
        for (int64_t j = 0; j < d; j += LANES) {
            float row[LANES];
            store_f32(row, LOAD(rows[lane] + j));
            for (int i = 0; i < LANES; i++) ((float *)(to + j + i))[lane] = row[i];
        }
}

/* The inverse, times a factor per lane. */
static void NAME(from_lanes)(const vec *x, int count, int64_t d, vec factor, T *const *rows) {
    for (int lane = 0; lane < count; lane++)
        for (int64_t j = 0; j < d; j += LANES) {
            float row[LANES];
            for (int i = 0; i < LANES; i++) row[i] = ((const float *)(x + j + i))[lane] * factor[lane];
            STORE(rows[lane] + j, load_f32(row));
        }
}

/* Converts `count` rows to fp32 (LANES, d); missing ones become 0. */
static void NAME(widen_rows)(const T *const *rows, int count, int64_t d, float *to) {
    memset(to + count * d, 0, (LANES - count) * d * sizeof(float));
    for (int lane = 0; lane < count; lane++)
        for (int64_t j = 0; j < d; j += LANES) store_f32(to + lane * d + j, LOAD(rows[lane] + j));
}

/* Attention of blocks of queries, each over its own list of keys.
 *
 * Block b has the rows rows[b]..rows[b + 1) of q (n, heads, d), and sees keys[starts[b]..starts[b + 1]) of text texts[b].
 * `wide` heads that share keys are computed together: head h of a block's row i is lane i * wide + h, and sees a key if bit
 * i * wide + h of the key's `seen` is set. Texts, heads and keys of k and v lie text_step, head_step and key_step apart. y is
 * like q. `most` and `share` (heads / wide, blocks, LANES), unless null, receive the largest score and 1 / the sum of weights.
 * Each thread has room_each numbers of `room`. */
void NAME(attention)(const T *q, const T *k, const T *v, T *y, float *most, float *share, const int32_t *rows,
                     const int32_t *texts, const int32_t *starts, const int32_t *keys, const uint16_t *seen, float *room,
                     int64_t room_each, int64_t blocks, int64_t heads, int64_t kv_heads, int64_t d, int64_t wide,
                     int64_t text_step, int64_t head_step, int64_t key_step, float scaling, int threads) {
    int64_t group = heads / kv_heads, work = kv_heads * blocks;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        for (int64_t item = work * t / threads; item < work * (t + 1) / threads; item++) {
            int64_t of = item / blocks, block = item % blocks, n = starts[block + 1] - starts[block];
            int64_t at = texts[block] * text_step + of * head_step;
            int count = (rows[block + 1] - rows[block]) * wide;
            float *wide_k = room + t * room_each, *wide_v = wide_k + FULL(n) * d;
            vec *scores = (vec *)(wide_v + FULL(n) * d), *lanes = scores + FULL(n);
            const int32_t *mine = keys + starts[block];
            IN_PAIRS(d, gather(k + at, key_step, mine, n, d, (void *)wide_k), NAME(widen)(k + at, key_step, mine, n, d, wide_k));
            IN_PAIRS(d, gather_pairs(v + at, key_step, mine, n, d, (void *)wide_v),
                     NAME(widen)(v + at, key_step, mine, n, d, wide_v));
            for (int64_t head = of * group; head < (of + 1) * group; head += wide) {
                const T *from[LANES];
                T *to[LANES];
                for (int lane = 0; lane < count; lane++) {
                    int64_t place = ((rows[block] + lane / wide) * heads + head + lane % wide) * d;
                    from[lane] = q + place, to[lane] = y + place;
                }
                IN_PAIRS(d, pairs_to_lanes(from, count, d, (void *)lanes), NAME(to_lanes)(from, count, d, lanes));
                IN_PAIRS(d, dots_of_pairs((void *)wide_k, (void *)lanes, scores, n, d, scaling),
                         dots(wide_k, lanes, scores, n, d, scaling));
                struct normal by = softmax(scores, seen + starts[block], n);
                if (most) {
                    store_f32(most + (head / wide * blocks + block) * LANES, by.most);
                    store_f32(share + (head / wide * blocks + block) * LANES, by.share);
                }
                IN_PAIRS(d, mix_of_pairs((void *)wide_v, scores, lanes, n, d), mix(wide_v, scores, lanes, n, d));
                IN_PAIRS(d, rows_from_lanes(lanes, count, d, by.share, to), NAME(from_lanes)(lanes, count, d, by.share, to));
            }
        }
}

/* Gradients of attention in q, k and v for the gradient g of y, where all keys belong to one text, and heads are computed singly.
 * of_k and of_v (total, kv_heads, d) are the sums of the parts (1 or threads, 2, total, kv_heads, d) of `sums`, which must be
 * initialised to 0; with one part, each thread has its own heads. */
void NAME(attention_back)(const T *g, const T *q, const T *k, const T *v, const T *y, const float *most, const float *share,
                          T *of_q, T *of_k, T *of_v, float *sums, const int32_t *rows, const int32_t *starts,
                          const int32_t *keys, const uint16_t *seen, float *room, int64_t room_each, int64_t total,
                          int64_t blocks, int64_t heads, int64_t kv_heads, int64_t d, int64_t parts, float scaling,
                          int threads) {
    int64_t group = heads / kv_heads, step = kv_heads * d, size = total * step;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        int64_t begin = parts > 1 ? kv_heads * blocks * t / threads : kv_heads * t / threads * blocks;
        int64_t end = parts > 1 ? kv_heads * blocks * (t + 1) / threads : kv_heads * (t + 1) / threads * blocks;
        for (int64_t item = begin; item < end; item++) {
            int64_t of = item / blocks, block = item % blocks, n = starts[block + 1] - starts[block];
            const int32_t *mine = keys + starts[block];
            int count = rows[block + 1] - rows[block];
            float *wide_k = room + t * room_each, *wide_v = wide_k + FULL(n) * d;
            float *wide_q = wide_v + FULL(n) * d, *wide_g = wide_q + LANES * d;
            vec *scores = (vec *)(wide_g + LANES * d), *slopes = scores + FULL(n), *lanes = slopes + FULL(n);
            float *of_keys = sums + (parts > 1 ? t : 0) * 2 * size + of * d;
            float *mixed_k = wide_k; /* in the order of `mix` */
            IN_PAIRS(d, gather(k + of * d, step, mine, n, d, (void *)wide_k), NAME(widen)(k + of * d, step, mine, n, d, wide_k));
            IN_PAIRS(d, gather(v + of * d, step, mine, n, d, (void *)wide_v), NAME(widen)(v + of * d, step, mine, n, d, wide_v));
            IN_PAIRS(d, mixed_k += FULL(n) * d / 2; gather_pairs(k + of * d, step, mine, n, d, (void *)mixed_k), );
            for (int64_t head = of * group; head < (of + 1) * group; head++) {
                const T *from_q[LANES], *from_g[LANES];
                T *to[LANES];
                float own[LANES] = {0}; /* sum of g y for each query */
                for (int lane = 0; lane < count; lane++) {
                    int64_t place = ((rows[block] + lane) * heads + head) * d;
                    from_q[lane] = q + place, from_g[lane] = g + place, to[lane] = of_q + place;
                    vec products = {0};
                    for (int64_t j = 0; j < d; j += LANES) products += LOAD(g + place + j) * LOAD(y + place + j);
                    own[lane] = sum(products);
                }
                IN_PAIRS(d, pairs_to_lanes(from_q, count, d, (void *)lanes), NAME(to_lanes)(from_q, count, d, lanes));
                IN_PAIRS(d, dots_of_pairs((void *)wide_k, (void *)lanes, scores, n, d, scaling),
                         dots(wide_k, lanes, scores, n, d, scaling));
                IN_PAIRS(d, pairs_to_lanes(from_g, count, d, (void *)lanes), NAME(to_lanes)(from_g, count, d, lanes));
                IN_PAIRS(d, dots_of_pairs((void *)wide_v, (void *)lanes, slopes, n, d, 1), dots(wide_v, lanes, slopes, n, d, 1));
                vec largest = load_f32(most + (head * blocks + block) * LANES);
                vec factor = load_f32(share + (head * blocks + block) * LANES);
                for (int64_t i = 0; i < n; i++) {
                    scores[i] = choose(seeing(seen[starts[block] + i]), vexp(scores[i] - largest) * factor, (vec){0});
                    slopes[i] = scores[i] * (slopes[i] - load_f32(own)) * scaling;
                }
                IN_PAIRS(d, pair_rows(from_q, count, d, (void *)wide_q), NAME(widen_rows)(from_q, count, d, wide_q));
                IN_PAIRS(d, pair_rows(from_g, count, d, (void *)wide_g), NAME(widen_rows)(from_g, count, d, wide_g));
                IN_PAIRS(d, spread_of_pairs(slopes, (void *)wide_q, mine, of_keys, step, n, d),
                         spread(slopes, wide_q, mine, of_keys, step, n, d));
                IN_PAIRS(d, spread_of_pairs(scores, (void *)wide_g, mine, of_keys + size, step, n, d),
                         spread(scores, wide_g, mine, of_keys + size, step, n, d));
                IN_PAIRS(d, mix_of_pairs((void *)mixed_k, slopes, lanes, n, d), mix(mixed_k, slopes, lanes, n, d));
                IN_PAIRS(d, rows_from_lanes(lanes, count, d, (vec){0} + 1, to),
                         NAME(from_lanes)(lanes, count, d, (vec){0} + 1, to));
            }
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < size; i += LANES) {
        vec of_key = {0}, of_value = {0};
        for (int part = 0; part < parts; part++) {
            of_key += load_f32(sums + part * 2 * size + i);
            of_value += load_f32(sums + part * 2 * size + size + i);
        }
        STORE(of_k + i, of_key);
        STORE(of_v + i, of_value);
    }
}

#undef IN_PAIRS
#endif
