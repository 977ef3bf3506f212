/* Convolutions of few small images, which take a library longer to prepare than to compute; kernels/convolution.py says for which.

   Images are (num_images, height, width, channels), filters (out_channels, kernel_height, kernel_width, in_channels), all dense.
   Channels are multiples of 2 * LANES. A tap is one position in the kernel. Each result is a sum in one order, whatever the number of
   threads. Functions return 0, or 1 if memory ran out. */

#include <stdlib.h>

#include "vectors.h"

#define GROUP 8 /* filters whose gradients are gathered together */
#define TILE 256 /* positions behind one read of them */

struct shape {
    long num_images, height, width, in_channels, out_height, out_width, out_channels, kernel_height, kernel_width, stride, padding;
};

/* to[p][lane] += sum over r of a[p][r] * m[r][lane], P rows of two vectors that stay in registers; r is 0 .. length - 1. */
#define DEFINE_WIDE(P)                                                                                                          \
    static inline __attribute__((always_inline)) void wide_##P(REAL *to, long to_row, const REAL *a, long a_row, const REAL *m,   \
                                                               long m_row, long length) {                                       \
        vec low[P], high[P];                                                                                                    \
        for (int p = 0; p < P; p++) low[p] = load(to + p * to_row), high[p] = load(to + p * to_row + LANES);                     \
        for (long r = 0; r < length; r++) {                                                                                     \
            const vec left = load(m + r * m_row), right = load(m + r * m_row + LANES);                                          \
            for (int p = 0; p < P; p++) low[p] += a[p * a_row + r] * left, high[p] += a[p * a_row + r] * right;                 \
        }                                                                                                                       \
        for (int p = 0; p < P; p++) store(to + p * to_row, low[p]), store(to + p * to_row + LANES, high[p]);                     \
    }
DEFINE_WIDE(6)
DEFINE_WIDE(4)
DEFINE_WIDE(2)
DEFINE_WIDE(1)

static void wide(long rows, REAL *to, long to_row, const REAL *a, long a_row, const REAL *m, long m_row, long length) {
    long p = 0;
    for (; p + 6 <= rows && rows - p != 8; p += 6) wide_6(to + p * to_row, to_row, a + p * a_row, a_row, m, m_row, length);
    for (; p + 4 <= rows; p += 4) wide_4(to + p * to_row, to_row, a + p * a_row, a_row, m, m_row, length);
    for (; p + 2 <= rows; p += 2) wide_2(to + p * to_row, to_row, a + p * a_row, a_row, m, m_row, length);
    for (; p < rows; p++) wide_1(to + p * to_row, to_row, a + p * a_row, a_row, m, m_row, length);
}

/* The outputs, first to before last, of which a tap at place k of the kernel reads something between begin and end. */
static inline void outputs_of(long k, long begin, long end, long out, const struct shape *s, long *first, long *last) {
    const long from = begin + s->padding - k, to = end + s->padding - k;
    *first = from <= 0 ? 0 : (from + s->stride - 1) / s->stride;
    *last = to <= 0 ? 0 : smaller((to + s->stride - 1) / s->stride, out);
}

/* Into how many parts rows are divided, so that every thread has work. */
static long parts_of_rows(long pieces, int threads) { return pieces >= threads ? 1 : (threads + pieces - 1) / pieces; }

/* y = convolution of x + bias. */
int convolve(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, const struct shape *s, int threads) {
    const long taps = s->kernel_height * s->kernel_width, length = taps * s->in_channels, vectors = s->out_channels / (2 * LANES);
    const long parts = parts_of_rows(vectors, threads), rows = s->num_images * s->out_height;
    int failed = 0;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (long v = 0; v < vectors; v++)
        for (long part = 0; part < parts; part++) {
            const long c = v * 2 * LANES, top = rows * part / parts, bottom = rows * (part + 1) / parts;
            REAL *turned = malloc(length * 2 * LANES * sizeof(REAL)); /* (taps, in_channels, 2 * LANES) */
            if (!turned) {
                failed = 1;
                continue;
            }
            for (long i = 0; i < length; i++)
                for (long o = 0; o < 2 * LANES; o++) turned[i * 2 * LANES + o] = weight[(c + o) * length + i];
            const vec low = load(bias + c), high = load(bias + c + LANES);
            for (long q = top * s->out_width; q < bottom * s->out_width; q++)
                store(y + q * s->out_channels + c, low), store(y + q * s->out_channels + c + LANES, high);
            for (long n = top / s->out_height; n * s->out_height < bottom; n++)
                for (long kh = 0; kh < s->kernel_height; kh++)
                    for (long kw = 0; kw < s->kernel_width; kw++) {
                        long h, h_end, w, w_end;
                        outputs_of(kh, 0, s->height, s->out_height, s, &h, &h_end);
                        outputs_of(kw, 0, s->width, s->out_width, s, &w, &w_end);
                        h = larger(h, top - n * s->out_height), h_end = smaller(h_end, bottom - n * s->out_height);
                        const long column = w * s->stride + kw - s->padding;
                        for (; h < h_end; h++) {
                            const long row = h * s->stride + kh - s->padding;
                            wide(w_end - w, y + ((n * s->out_height + h) * s->out_width + w) * s->out_channels + c, s->out_channels,
                                 x + ((n * s->height + row) * s->width + column) * s->in_channels, s->stride * s->in_channels,
                                 turned + (kh * s->kernel_width + kw) * s->in_channels * 2 * LANES, 2 * LANES, s->in_channels);
                        }
                    }
            free(turned);
        }
    return failed;
}

/* grad_x = gradient of x, from grad_y of y. */
static void gradient_of_input(const REAL *grad_y, const REAL *weight, REAL *grad_x, const struct shape *s, int threads) {
    const long taps = s->kernel_height * s->kernel_width, vectors = s->in_channels / (2 * LANES);
    const long parts = parts_of_rows(s->num_images * vectors, threads);
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads) if (threads > 1)
    for (long n = 0; n < s->num_images; n++)
        for (long v = 0; v < vectors; v++)
            for (long part = 0; part < parts; part++) {
                const long top = s->height * part / parts, bottom = s->height * (part + 1) / parts, c = v * 2 * LANES;
                const REAL *from = grad_y + n * s->out_height * s->out_width * s->out_channels;
                REAL *to = grad_x + n * s->height * s->width * s->in_channels + c;
                const vec zero = {0};
                for (long q = top * s->width; q < bottom * s->width; q++)
                    store(to + q * s->in_channels, zero), store(to + q * s->in_channels + LANES, zero);
                for (long kh = 0; kh < s->kernel_height; kh++)
                    for (long kw = 0; kw < s->kernel_width; kw++) {
                        long h, h_end, w, w_end;
                        outputs_of(kh, top, bottom, s->out_height, s, &h, &h_end);
                        outputs_of(kw, 0, s->width, s->out_width, s, &w, &w_end);
                        const long column = w * s->stride + kw - s->padding;
                        for (; h < h_end; h++)
                            wide(w_end - w, to + ((h * s->stride + kh - s->padding) * s->width + column) * s->in_channels,
                                 s->stride * s->in_channels, from + (h * s->out_width + w) * s->out_channels, s->out_channels,
                                 weight + (kh * s->kernel_width + kw) * s->in_channels + c, taps * s->in_channels, s->out_channels);
                    }
            }
}

/* to[p][lane] += sum over r and t of a[r][t][p] * m[r][t][lane], for GROUP rows of a vector each; see gradient_of_weight. */
static inline void gather(REAL *to, long to_row, const REAL *a, long a_r, long a_t, const REAL *m, long m_r, long m_t, long rows,
                          long columns) {
    vec sum[GROUP];
    for (int p = 0; p < GROUP; p++) sum[p] = load(to + p * to_row);
    for (long r = 0; r < rows; r++)
        for (long t = 0; t < columns; t++) {
            const vec v = load(m + r * m_r + t * m_t);
            for (int p = 0; p < GROUP; p++) sum[p] += a[r * a_r + t * a_t + p] * v;
        }
    for (int p = 0; p < GROUP; p++) store(to + p * to_row, sum[p]);
}

/* grad_weight gains the gradient of the filters. */
static void gradient_of_weight(const REAL *grad_y, const REAL *x, REAL *grad_weight, const struct shape *s, int threads) {
    const long taps = s->kernel_height * s->kernel_width, height = larger(1, TILE / s->out_width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < s->out_channels; o += GROUP)
        for (long n = 0; n < s->num_images; n++)
            for (long top = 0; top < s->out_height; top += height)
                for (long kh = 0; kh < s->kernel_height; kh++)
                    for (long kw = 0; kw < s->kernel_width; kw++) {
                        long h, h_end, w, w_end;
                        outputs_of(kh, 0, s->height, s->out_height, s, &h, &h_end);
                        outputs_of(kw, 0, s->width, s->out_width, s, &w, &w_end);
                        h = larger(h, top), h_end = smaller(h_end, top + height);
                        if (h >= h_end || w >= w_end) continue;
                        const REAL *a = grad_y + ((n * s->out_height + h) * s->out_width + w) * s->out_channels + o;
                        const long row = h * s->stride + kh - s->padding, column = w * s->stride + kw - s->padding;
                        const REAL *m = x + ((n * s->height + row) * s->width + column) * s->in_channels;
                        REAL *to = grad_weight + (o * taps + kh * s->kernel_width + kw) * s->in_channels;
                        for (long c = 0; c < s->in_channels; c += LANES)
                            gather(to + c, taps * s->in_channels, a, s->out_width * s->out_channels, s->out_channels, m + c,
                                   s->stride * s->width * s->in_channels, s->stride * s->in_channels, h_end - h, w_end - w);
                    }
}

/* The way back: grad_x becomes the gradient of x, grad_weight gains that of the filters. Null: grad_x, grad_weight. */
void convolve_backward(const REAL *grad_y, const REAL *x, const REAL *weight, REAL *grad_x, REAL *grad_weight,
                       const struct shape *s, int threads) {
    if (grad_x) gradient_of_input(grad_y, weight, grad_x, s, threads);
    if (grad_weight) gradient_of_weight(grad_y, x, grad_weight, s, threads);
}
