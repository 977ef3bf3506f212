/* What surrounds a folded convolution, in one pass over memory each way; norm/epilogue.py calls it and says what is computed.
   At the end, what standardised filters need.

   Tensors are rows, (num_images * num_positions, channels), with channels adjacent and a multiple of LANES. REAL is float or
   double. A tile of rows that fits the first cache is walked one vector of channels at a time, so that its sums stay in
   registers; sums of tiles are added up in double, and threads in their order: the same number of threads gives the same bits.
   What is called with an argument that may be null says so. Functions return 0, or 1 if memory ran out. */

#include <math.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#include "vectors.h"

#define SQRT(x) (sizeof(REAL) == sizeof(float) ? (REAL)sqrtf((float)(x)) : (REAL)sqrt(x))
#define TILE 1024 /* entries of a tile, in each tensor */
#define MIN_ROWS 8

typedef __typeof__((vec){0} < (vec){0}) mask;

enum { IDENTITY, RELU, LEAKY_RELU };

/* Rows of a layer's table of constants: Row in norm/epilogue.py. */
enum { SCALE, SHIFT, OFFSET, GAIN, GAMMA_SCALE, GAMMA_SHIFT, NLL_SQUARE, NLL_IMAGE, MEAN_MOMENT, RAW_MOMENT, RAW_IMAGE, SPREAD };

static inline vec choose(mask which, vec yes, vec no) { return (vec)((which & (mask)yes) | (~which & (mask)no)); }

/* What is expected of a normal x with variance pi/8 * spread where a relu of x + shift is 0; Row.SPREAD. */
static inline vec cut_off(vec shift, vec spread) {
    const vec square = shift * shift + spread;
    vec root;
    for (long lane = 0; lane < LANES; lane++) root[lane] = SQRT(square[lane]);
    return (shift + root) * (REAL)-0.5;
}

static inline void add_to(double *sums, vec v) {
    for (long lane = 0; lane < LANES; lane++) sums[lane] += v[lane];
}

static long rows_of_tile(long channels) { return channels * MIN_ROWS > TILE ? MIN_ROWS : TILE / channels; }

/* Adds the threads' shares, (threads, length), to sums. */
static void add_threads(double *sums, const double *shares, long length, int threads) {
    for (int thread = 0; thread < threads; thread++)
        for (long i = 0; i < length; i++) sums[i] += shares[thread * length + i];
}

/* Rows first to last: y becomes act(scale * y + shift + residual), or stays where table is null; sums, (4, channels), gain
   those of y and y^2 and, for a probe of a relu, those of q, as backward reads it off, and of q * y. */
static int forward_rows(REAL *y, const REAL *residual, const REAL *table, long first, long last, long channels,
                        int activation, REAL slope, int threads, int is_probe, double *sums) {
    const long height = rows_of_tile(channels);
    double *shares = calloc(threads * 4 * channels, sizeof(double));
    if (!shares) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long top = first; top < last; top += height) {
        const long begin = top * channels, end = smaller(top + height, last) * channels;
        double *own = shares + omp_get_thread_num() * 4 * channels;
        for (long c = 0; c < channels; c += LANES) {
            const vec zero = {0};
            const vec scale = table ? load(table + SCALE * channels + c) : zero;
            const vec shift = table ? load(table + SHIFT * channels + c) : zero;
            const vec spread = is_probe ? load(table + SPREAD * channels + c) : zero;
            vec sum = zero, square = zero, shown = zero, product = zero;
            for (long i = begin + c; i < end; i += channels) {
                const vec was = load(y + i);
                vec v = was;
                sum += v;
                square += v * v;
                if (!table) continue;
                v = v * scale + shift;
                if (residual) v += load(residual + i);
                if (activation == RELU) v = choose(v < zero, zero, v); /* in this order a NaN stays one */
                if (activation == LEAKY_RELU) v = choose(v < zero, v * slope, v);
                store(y + i, v);
                if (is_probe) {
                    const vec other = residual ? load(residual + i) : zero;
                    vec q = v - other;
                    if (activation == RELU) q = choose(v <= zero, shift + cut_off(other + shift, spread), q);
                    shown += q;
                    product += q * was;
                }
            }
            add_to(own + c, sum);
            add_to(own + channels + c, square);
            if (is_probe) add_to(own + 2 * channels + c, shown), add_to(own + 3 * channels + c, product);
        }
    }
    add_threads(sums, shares, 4 * channels, threads);
    free(shares);
    return 0;
}

/* Writes act(scale * y + shift + residual) into y, and sums, (2, channels), of y and y^2; adds to probe, (4, channels), what
   forward_rows says of the first probe_images, and to nll the likelihood of the images. Null: table, then y stays and there is
   no nll; residual; nll; probe, with 0 probe_images. */
int forward(REAL *y, const REAL *residual, const REAL *table, long num_images, long num_positions, long channels,
            long probe_images, int activation, REAL slope, int threads, REAL *sums, REAL *probe, REAL *nll) {
    const long between = probe_images * num_positions;
    double *seen = calloc(8 * channels, sizeof(double)), *rest = seen + 4 * channels;
    int failed = !seen;
    if (!failed && probe_images)
        failed = forward_rows(y, residual, table, 0, between, channels, activation, slope, threads, 1, seen);
    if (!failed && probe_images < num_images)
        failed = forward_rows(y, residual, table, between, num_images * num_positions, channels, activation, slope, threads, 0, rest);
    if (!failed) {
        for (long i = 0; i < 2 * channels; i++) sums[i] = (REAL)(seen[i] + rest[i]);
        for (long i = 0; probe_images && i < 4 * channels; i++) probe[i] += (REAL)seen[i];
        double likelihood = 0;
        for (long c = 0; nll && c < channels; c++)
            likelihood += (double)table[NLL_SQUARE * channels + c] * sums[channels + c] / num_positions +
                          (double)table[NLL_IMAGE * channels + c] * num_images;
        if (nll) *nll += (REAL)likelihood;
    }
    free(seen);
    return failed;
}

/* With g = grad_out * act'(z):  grad_y = scale * g + grad_nll * (offset + gain * q), and grad = g. q is `given` or, where that
   is null, read off z: what entered the activation, less the residual. vectors, (4, channels), gain the gradients of mean,
   raw std, gamma and beta, for which sums are those of the forward. grad or grad_y may be grad_out itself.
   Null: given; residual; z, with the identity and a given q; grad; grad_nll, which is then 0; offset and gain are 0 unless
   it corrects. */
int backward(const REAL *grad_out, const REAL *z, const REAL *given, const REAL *residual, const REAL *table,
             const REAL *sums, const REAL *grad_nll, long num_images, long num_positions, long channels, int activation,
             REAL slope, int corrects, int threads, REAL *grad_y, REAL *grad, REAL *vectors) {
    const long height = rows_of_tile(channels), num_rows = num_images * num_positions;
    const REAL weight = grad_nll ? *grad_nll : 0;
    const int imputes = corrects && activation == RELU && !given;
    double *shares = calloc((threads + 1) * 2 * channels, sizeof(double)), *total = shares + threads * 2 * channels;
    if (!shares) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long top = 0; top < num_rows; top += height) {
        const long begin = top * channels, end = smaller(top + height, num_rows) * channels;
        double *own = shares + omp_get_thread_num() * 2 * channels;
        for (long c = 0; c < channels; c += LANES) {
            const vec zero = {0}, scale = load(table + SCALE * channels + c);
            const vec offset = corrects ? weight * load(table + OFFSET * channels + c) : zero;
            const vec gain = corrects ? weight * load(table + GAIN * channels + c) : zero;
            const vec shift = load(table + SHIFT * channels + c), spread = load(table + SPREAD * channels + c);
            vec sum = zero, product = zero;
            for (long i = begin + c; i < end; i += channels) {
                vec g = load(grad_out + i), q = zero;
                if (activation == IDENTITY) {
                    q = given ? load(given + i) : load(z + i);
                } else {
                    const vec out = load(z + i);
                    q = out;
                    if (activation == RELU) g = choose(out <= zero, zero, g);
                    if (activation == LEAKY_RELU) g = choose(out <= zero, g * slope, g), q = choose(out < zero, out / slope, out);
                    if (given) q = load(given + i);
                }
                const vec other = residual ? load(residual + i) : zero;
                q -= other;
                if (imputes) q = choose(load(z + i) <= zero, shift + cut_off(other + shift, spread), q);
                sum += g;
                product += g * q;
                if (grad) store(grad + i, g);
                store(grad_y + i, corrects ? g * scale + offset + q * gain : g * scale);
            }
            add_to(own + c, sum);
            add_to(own + channels + c, product);
        }
    }
    add_threads(total, shares, 2 * channels, threads);
    for (long c = 0; c < channels; c++) {
        const REAL *constants = table + c;
        const double sum = total[c], product = total[channels + c];
        vectors[c] += (REAL)(weight * constants[MEAN_MOMENT * channels] * sums[c] / num_positions);
        vectors[channels + c] += (REAL)(weight * (constants[RAW_MOMENT * channels] * sums[channels + c] / num_positions +
                                                 constants[RAW_IMAGE * channels] * num_images));
        vectors[2 * channels + c] += (REAL)(constants[GAMMA_SCALE * channels] * product + constants[GAMMA_SHIFT * channels] * sum);
        vectors[3 * channels + c] += (REAL)sum;
    }
    free(shares);
    return 0;
}

/* ---- the probe after a step; norm/probe.py says what is computed ---- */

/* Rows of a following layer's table: FollowRow in norm/probe.py. */
enum { STD, OLD_VARIANCE, DRIFT, GAMMA, BETA };

/* y, in multiples of unit, becomes act(gamma * (x - mean) / std + beta + residual) with the mean and std that follow from its
   own sums, which go to found, (2, channels), the mean as its change. Null: residual; unit, which is then 1. */
int follow(REAL *y, const REAL *residual, const REAL *table, const REAL *unit, long num_images, long num_positions, long channels,
           int activation, REAL slope, REAL gain, REAL eps, int shared, int threads, REAL *found) {
    const long num_rows = num_images * num_positions;
    double *sums = calloc(8 * channels, sizeof(double)), *wasted = sums + 4 * channels;
    REAL *map = calloc(2 * channels, sizeof(REAL));
    int failed = !sums || !map || forward_rows(y, 0, 0, 0, num_rows, channels, IDENTITY, 0, threads, 0, sums);
    if (!failed) {
        double *shift = sums, *square = sums + channels, all_shift = 0, all_square = 0;
        for (long c = 0; c < channels; c++) {
            const double one = unit ? unit[c] : 1;
            all_shift += shift[c] *= one / num_rows;
            all_square += square[c] *= one * one / num_rows;
        }
        for (long c = 0; c < channels; c++) {
            const double m = shared ? all_shift / channels : shift[c], s = shared ? all_square / channels : square[c];
            const double old_std = table[STD * channels + c], variance = fmax(s - m * m, 0);
            const double guard = (1e-4 + 1.0 / num_rows) * old_std * old_std;
            const double ratio = pow((variance + guard) / (table[OLD_VARIANCE * channels + c] + guard), gain / 2.0);
            const double std = fmax(old_std * ratio, eps), change = gain * (m + table[DRIFT * channels + c]);
            const double scale = table[GAMMA * channels + c] / std;
            found[c] = (REAL)change;
            found[channels + c] = (REAL)(isnan(old_std * ratio) ? old_std * ratio : std); /* fmax would hide it */
            map[SCALE * channels + c] = (REAL)(scale * (unit ? unit[c] : 1));
            map[SHIFT * channels + c] = (REAL)(table[BETA * channels + c] - scale * change);
        }
        failed = forward_rows(y, residual, map, 0, num_rows, channels, activation, slope, threads, 0, wasted);
    }
    free(sums);
    free(map);
    return failed;
}

/* ---- standardised filters: weight is (num_filters, length); norm/standardize.py says what is computed ---- */

/* Sum of a, and of a * b. */
static inline void sums_of_filter(const REAL *a, const REAL *b, long length, double *sum, double *product) {
    double sums = 0, products = 0;
#pragma omp simd reduction(+ : sums, products)
    for (long i = 0; i < length; i++) sums += a[i], products += (double)a[i] * b[i];
    *sum = sums, *product = products;
}

/* Takes each filter's mean out of it; of one whose mean is rounding no bit changes. */
void centre_filters(REAL *weight, long num_filters, long length, REAL epsilon) {
    for (REAL *filter = weight; filter < weight + num_filters * length; filter += length) {
        double sum, square;
        sums_of_filter(filter, filter, length, &sum, &square);
        const REAL mean = (REAL)(sum / length);
        if (fabs((double)mean) <= epsilon * sqrt(square / length)) continue;
        for (long i = 0; i < length; i++) filter[i] -= mean;
    }
}

/* scale, (num_filters), becomes 1 / sqrt(sum of squares + eps). */
void filter_scale(const REAL *weight, long num_filters, long length, REAL eps, REAL *scale) {
    for (long f = 0; f < num_filters; f++) {
        double sum, square;
        sums_of_filter(weight + f * length, weight + f * length, length, &sum, &square);
        scale[f] = (REAL)(1 / sqrt(square + eps));
    }
}

/* moments, (2, num_filters), become each filter's mean of grad, and its sum of grad * weight. */
void filter_moments(const REAL *weight, const REAL *grad, long num_filters, long length, REAL *moments) {
    for (long f = 0; f < num_filters; f++) {
        double sum, along;
        sums_of_filter(grad + f * length, weight + f * length, length, &sum, &along);
        moments[f] = (REAL)(sum / length);
        moments[num_filters + f] = (REAL)along;
    }
}

/* Takes mean and scale^2 * along * weight out of grad, less those of before. */
void project_filters(const REAL *weight, REAL *grad, const REAL *scale, const REAL *before, const REAL *after, long num_filters,
                     long length) {
    for (long f = 0; f < num_filters; f++) {
        const REAL mean = after[f] - before[f], along = after[num_filters + f] - before[num_filters + f];
        const REAL factor = scale[f] * scale[f] * along;
        for (long i = f * length; i < (f + 1) * length; i++) grad[i] -= mean + factor * weight[i];
    }
}
