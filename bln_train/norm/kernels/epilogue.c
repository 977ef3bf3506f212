/* What surrounds a folded convolution, in one pass over memory each way; kernels/epilogue.py calls it and says what is computed.
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

/* Rows of a layer's table of constants: Row in kernels/epilogue.py. */
enum { SCALE, SHIFT, OFFSET, GAIN, GAMMA_SCALE, GAMMA_SHIFT, NLL_SQUARE, NLL_IMAGE, MEAN_MOMENT, RAW_MOMENT, RAW_IMAGE, SPREAD,
       INVERSE };

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

/* Rows top to bottom, a tile: y becomes act(scale * y + shift + residual), or stays where table is null; sums, (4, channels), gain
   those of y and y^2 and, for a probe of a relu, those of q, as backward reads it off, and of q * y. */
static void forward_tile(REAL *y, const REAL *residual, const REAL *table, long top, long bottom, long channels, int activation,
                         REAL slope, int is_probe, double *sums) {
    const long begin = top * channels, end = bottom * channels;
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
        add_to(sums + c, sum);
        add_to(sums + channels + c, square);
        if (is_probe) add_to(sums + 2 * channels + c, shown), add_to(sums + 3 * channels + c, product);
    }
}

/* The tiles of all rows; sums gain as there. */
static int forward_rows(REAL *y, const REAL *residual, const REAL *table, long num_rows, long channels, int activation, REAL slope,
                        int threads, int is_probe, double *sums) {
    const long height = rows_of_tile(channels);
    double *shares = calloc(threads * 4 * channels, sizeof(double));
    if (!shares) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long top = 0; top < num_rows; top += height)
        forward_tile(y, residual, table, top, smaller(top + height, num_rows), channels, activation, slope, is_probe,
                     shares + omp_get_thread_num() * 4 * channels);
    add_threads(sums, shares, 4 * channels, threads);
    free(shares);
    return 0;
}

/* From each image's sums of forward_tile, seen, (num_images, 4, channels): those of y and y^2 to sums, (num_images, 2, channels), all
   of the first probe_images added to probe, (4, channels), and the likelihood to nll. Null: sums; probe, with 0 probe_images; nll. */
static void give_sums(const double *seen, const REAL *table, long num_images, long num_positions, long channels, long probe_images,
                      REAL *sums, REAL *probe, REAL *nll) {
    double likelihood = 0;
    for (long n = 0; n < num_images; n++) {
        const double *own = seen + n * 4 * channels;
        for (long i = 0; sums && i < 2 * channels; i++) sums[n * 2 * channels + i] = (REAL)own[i];
        for (long i = 0; n < probe_images && i < 4 * channels; i++) probe[i] += (REAL)own[i];
        for (long c = 0; nll && c < channels; c++)
            likelihood += (double)table[NLL_SQUARE * channels + c] * own[channels + c] / num_positions +
                          (double)table[NLL_IMAGE * channels + c];
    }
    if (nll) *nll += (REAL)likelihood;
}

/* Writes act(scale * y + shift + residual) into y, and sums, (num_images, 2, channels), of y and y^2; adds to probe, (4, channels),
   what forward_tile says of the first probe_images, and to nll the likelihood of the images. Null: table, then y stays and there is
   no nll; residual; nll; probe, with 0 probe_images. */
int forward(REAL *y, const REAL *residual, const REAL *table, long num_images, long num_positions, long channels,
            long probe_images, int activation, REAL slope, int threads, REAL *sums, REAL *probe, REAL *nll) {
    const long size = num_positions * channels, height = rows_of_tile(channels);
    double *seen = calloc(num_images * 4 * channels, sizeof(double));
    int failed = !seen;
    if (!failed && num_images == 1)
        failed = forward_rows(y, residual, table, num_positions, channels, activation, slope, threads, probe_images > 0, seen);
    else if (!failed) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long n = 0; n < num_images; n++)
            for (long top = 0; top < num_positions; top += height)
                forward_tile(y + n * size, residual ? residual + n * size : 0, table, top, smaller(top + height, num_positions),
                             channels, activation, slope, n < probe_images, seen + n * 4 * channels);
    }
    if (!failed) give_sums(seen, table, num_images, num_positions, channels, probe_images, sums, probe, nll);
    free(seen);
    return failed;
}

/* What surrounds one layer's output, for backward; its arguments. */
typedef struct {
    const REAL *grad_out, *z, *given, *residual, *table;
    long channels;
    int activation, corrects;
    REAL slope;
    REAL *grad_y, *grad;
} Backward;

/* Rows top to bottom of all images, a tile: adds sums of g and g * q to sums, (2, channels), unless null, and writes grad_y and
   grad with the map offset + gain * q, (2, channels), unless null. scales, (channels), are in the place of the table's. */
static inline __attribute__((always_inline)) void backward_tile(const Backward *of, long top, long bottom, const REAL *map,
                                                                const REAL *scales, double *sums) {
    const long channels = of->channels, begin = top * channels, end = bottom * channels;
    const REAL *table = of->table, *given = of->given, *residual = of->residual, *z = of->z;
    const int activation = of->activation, imputes = of->corrects && activation == RELU && !given;
    const REAL slope = of->slope;
    for (long c = 0; c < channels; c += LANES) {
        const vec zero = {0}, scale = load(scales + c);
        const vec offset = map ? load(map + c) : zero, gain = map ? load(map + channels + c) : zero;
        const vec shift = load(table + SHIFT * channels + c), spread = load(table + SPREAD * channels + c);
        vec sum = zero, product = zero;
        for (long i = begin + c; i < end; i += channels) {
            vec g = load(of->grad_out + i), q = zero;
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
            if (imputes && map) q = choose(load(z + i) <= zero, shift + cut_off(other + shift, spread), q);
            sum += g;
            product += g * q; /* where q is cut off, g is 0 */
            if (!map) continue;
            if (of->grad) store(of->grad + i, g);
            store(of->grad_y + i, of->corrects ? g * scale + offset + q * gain : g * scale);
        }
        if (sums) add_to(sums + c, sum), add_to(sums + channels + c, product);
    }
}

/* Rows of state: BalanceRow in norm/balance.py. */
enum { LEFT_SHIFT, LEFT_SLOPE, TO_COME };

/* What is taken out of one image's gradient in one channel, and by how much its regressors are scaled down: norm/balance.py. */
typedef struct {
    double shift, slope, damping;
} Correction;

/* That of the image that comes next, whose mean of xhat^2 is `second`. */
static inline Correction correction_of(const REAL *prior, const REAL *state, long channels, long c, double second) {
    const double rest = fmax(state[TO_COME * channels + c], HORIZON), damping = sqrt(fmin(LARGEST_SQUARE / (1 + second), 1));
    return (Correction){damping * (prior[c] + state[LEFT_SHIFT * channels + c] / rest),
                        damping * (prior[channels + c] + state[LEFT_SLOPE * channels + c] / rest), damping};
}

/* What the image leaves over, from its means of g, g * xhat, xhat and xhat^2. */
static inline void leave_over(REAL *state, Correction taken, double along_one, double along_xhat, double first, double second,
                              long channels, long c) {
    state[LEFT_SHIFT * channels + c] += (REAL)(taken.damping * (along_one - taken.shift - taken.slope * first));
    state[LEFT_SLOPE * channels + c] += (REAL)(taken.damping * (along_xhat - taken.shift * first - taken.slope * second));
    state[TO_COME * channels + c] -= 1;
}

/* The map of the image that comes next, from of_y, its forward's sums; then what it leaves over, from sums of its g and g * q: map
   and sums may be null to leave it out. */
static void balance_image(const REAL *table, const REAL *prior, REAL *state, REAL weight, long num_positions, long channels,
                          REAL *map, const double *sums, const REAL *of_y) {
    for (long c = 0; c < channels; c++) {
        const REAL *constants = table + c;
        const double inverse = constants[INVERSE * channels];
        const double first = inverse * of_y[c] / num_positions, second = inverse * inverse * of_y[channels + c] / num_positions;
        const Correction taken = correction_of(prior, state, channels, c, second);
        if (map) {
            map[c] = (REAL)(-weight * (constants[SCALE * channels] * taken.shift + constants[OFFSET * channels] * taken.slope));
            map[channels + c] = (REAL)(-weight * constants[GAIN * channels] * taken.slope);
        }
        if (!sums || weight == 0) continue;
        const double along_one = sums[c] / num_positions / weight, along_q = sums[channels + c] / num_positions / weight;
        const double along_xhat = constants[GAMMA_SCALE * channels] * along_q + constants[GAMMA_SHIFT * channels] * along_one;
        leave_over(state, taken, along_one, along_xhat, first, second, channels, c);
    }
}

/* vectors, (2, channels), gain the gradients of mean and raw std, from the forward's sums, (num_images, 2, channels). */
static void likelihood_back(const REAL *table, const REAL *sums, REAL weight, long num_images, long num_positions, long channels,
                            REAL *vectors) {
    for (long c = 0; c < channels; c++) {
        const REAL *constants = table + c;
        double first = 0, second = 0;
        for (long n = 0; n < num_images; n++) first += sums[n * 2 * channels + c], second += sums[(n * 2 + 1) * channels + c];
        vectors[c] += (REAL)(weight * constants[MEAN_MOMENT * channels] * first / num_positions);
        vectors[channels + c] += (REAL)(weight * (constants[RAW_MOMENT * channels] * second / num_positions +
                                                 constants[RAW_IMAGE * channels] * num_images));
    }
}

#define GROUP_BYTES 262144 /* of a thread's images that are read twice: they are to stay in its second cache */

/* With g = grad_out * act'(z):  grad_y = scale * g - grad_nll * (scale * A + B * (offset + gain * q)), and grad = g. q is `given`
   or, where that is null, read off z: what entered the activation, less the residual. (A, B) is the image's correction, from
   prior, (2, channels), and state, (3, channels), which goes on to the images that come (norm/balance.py). vectors, (4, channels),
   gain the gradients of mean, raw std, gamma and beta, for which sums, (num_images, 2, channels), are those of the forward. grad or
   grad_y may be grad_out itself. Null: given; residual; z, with the identity and a given q; grad; grad_nll, which is then 0; prior
   and state, then A and B are 0. */
int backward(const REAL *grad_out, const REAL *z, const REAL *given, const REAL *residual, const REAL *table,
             const REAL *sums, const REAL *grad_nll, long num_images, long num_positions, long channels, int activation,
             REAL slope, const REAL *prior, REAL *state, int threads, REAL *grad_y, REAL *grad, REAL *vectors) {
    const int corrects = state && grad_nll, apart = corrects && num_images > 1;
    const Backward of = {grad_out, z, given, residual, table, channels, activation, corrects, slope, grad_y, grad};
    const long height = rows_of_tile(channels), num_rows = num_images * num_positions, width = 2 * channels;
    const long image_bytes = num_positions * channels * (long)sizeof(REAL) * (residual ? 3 : 2);
    const long group = apart ? threads * (GROUP_BYTES > image_bytes ? GROUP_BYTES / image_bytes : 1) : 1;
    const REAL weight = grad_nll ? *grad_nll : 0;
    double *total = calloc((1 + (apart ? group : threads)) * width, sizeof(double)), *shares = total + width;
    REAL *maps = calloc(group * width, sizeof(REAL));
    const int failed = !total || !maps;
    if (!failed && !apart) {
        if (corrects) balance_image(table, prior, state, weight, num_positions, channels, maps, 0, sums);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long top = 0; top < num_rows; top += height)
            backward_tile(&of, top, smaller(top + height, num_rows), maps, table + SCALE * channels, shares + omp_get_thread_num() * width);
        add_threads(total, shares, width, threads);
        if (corrects) balance_image(table, prior, state, weight, num_positions, channels, 0, total, sums);
    }
    for (long first = 0; !failed && apart && first < num_images; first += group) {
        const long num = smaller(group, num_images - first);
        for (long i = 0; i < num * width; i++) shares[i] = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long n = 0; n < num; n++)
            for (long top = 0; top < num_positions; top += height)
                backward_tile(&of, (first + n) * num_positions + top, (first + n) * num_positions + smaller(top + height, num_positions),
                              0, table + SCALE * channels, shares + n * width);
        for (long n = 0; n < num; n++)
            balance_image(table, prior, state, weight, num_positions, channels, maps + n * width, shares + n * width,
                          sums + (first + n) * width);
        add_threads(total, shares, width, (int)num);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long n = 0; n < num; n++)
            for (long top = 0; top < num_positions; top += height)
                backward_tile(&of, (first + n) * num_positions + top, (first + n) * num_positions + smaller(top + height, num_positions),
                              maps + n * width, table + SCALE * channels, 0);
    }
    if (!failed) likelihood_back(table, sums, weight, num_images, num_positions, channels, vectors);
    for (long c = 0; !failed && c < channels; c++) {
        const REAL *constants = table + c;
        vectors[2 * channels + c] += (REAL)(constants[GAMMA_SCALE * channels] * total[channels + c] +
                                            constants[GAMMA_SHIFT * channels] * total[c]);
        vectors[3 * channels + c] += (REAL)total[c];
    }
    free(total);
    free(maps);
    return failed;
}

/* ---- groups of channels of each image; kernels/channel.py says what is computed ---- */

/* m and r of a group, from the sums of xhat and of its square over `count` values. */
static void group_moments(double total, double square, double count, REAL eps, double *mean, double *scale) {
    *mean = total / count;
    *scale = 1 / sqrt(fmax(square / count - *mean * *mean, 0) + eps);
}

/* Scale and shift of y, (2, channels), that make it gamma * u + beta, from an image's sums of y and y^2, (2, channels). Null: inverse,
   which is then 1. */
static void map_of_groups(const double *sums, const REAL *inverse, const REAL *gamma, const REAL *beta, long group, REAL eps,
                          long num_positions, long channels, REAL *map) {
    for (long first = 0; first < channels; first += group) {
        double total = 0, square = 0, mean, scale;
        for (long c = first; c < first + group; c++) {
            const double one = inverse ? inverse[c] : 1;
            total += one * sums[c], square += one * one * sums[channels + c];
        }
        group_moments(total, square, (double)group * num_positions, eps, &mean, &scale);
        for (long c = first; c < first + group; c++) {
            map[SCALE * channels + c] = (REAL)(gamma[c] * scale * (inverse ? inverse[c] : 1));
            map[SHIFT * channels + c] = (REAL)(beta[c] - gamma[c] * scale * mean);
        }
    }
}

/* y becomes act(gamma * u + beta + residual); sums, (num_images, 2, channels), become those of y and y^2, those of the first
   probe_images are added to probe, (4, channels), whose last two rows stay, and to nll the likelihood. Null: residual; table, then xhat is y; sums; probe, with
   0 probe_images; nll. */
int forward_groups(REAL *y, const REAL *residual, const REAL *table, const REAL *gamma, const REAL *beta, long group, REAL eps,
                   long num_images, long num_positions, long channels, long probe_images, int activation, REAL slope, int threads,
                   REAL *sums, REAL *probe, REAL *nll) {
    const long size = num_positions * channels, height = rows_of_tile(channels);
    const REAL *inverse = table ? table + INVERSE * channels : 0;
    double *seen = calloc((num_images + threads) * 4 * channels, sizeof(double)), *wasted = seen + num_images * 4 * channels;
    REAL *maps = calloc(threads * 2 * channels, sizeof(REAL));
    int failed = !seen || !maps;
    if (!failed && num_images == 1) {
        failed = forward_rows(y, 0, 0, num_positions, channels, IDENTITY, 0, threads, 0, seen);
        map_of_groups(seen, inverse, gamma, beta, group, eps, num_positions, channels, maps);
        failed = failed || forward_rows(y, residual, maps, num_positions, channels, activation, slope, threads, 0, wasted);
    } else if (!failed) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long n = 0; n < num_images; n++) {
            double *own = seen + n * 4 * channels;
            REAL *map = maps + omp_get_thread_num() * 2 * channels;
            for (long top = 0; top < num_positions; top += height)
                forward_tile(y + n * size, 0, 0, top, smaller(top + height, num_positions), channels, IDENTITY, 0, 0, own);
            map_of_groups(own, inverse, gamma, beta, group, eps, num_positions, channels, map);
            for (long top = 0; top < num_positions; top += height)
                forward_tile(y + n * size, residual ? residual + n * size : 0, map, top, smaller(top + height, num_positions),
                             channels, activation, slope, 0, wasted + omp_get_thread_num() * 4 * channels);
        }
    }
    if (!failed) give_sums(seen, table, num_images, num_positions, channels, probe_images, sums, probe, nll);
    free(seen);
    free(maps);
    return failed;
}

/* What the way back through the groups of one image is: from its sums of g and g * y, `along`, and of y and y^2, `of_y`, each
   (2, channels), the map of grad_y, (3, channels): offset, gain and scale. The correction of h is taken from prior and state, which
   goes on; vectors, (6, channels), gain what kernels/channel.py says. Null: prior and state. */
static void groups_of_image(const REAL *table, const REAL *prior, REAL *state, REAL weight, const REAL *gamma,
                            long group, REAL eps, long num_positions, long channels, const double *along, const REAL *of_y,
                            REAL *map, double *vectors) {
    const REAL *inverse = table + INVERSE * channels;
    for (long first = 0; first < channels; first += group) {
        double total = 0, square = 0, e1 = 0, e2 = 0, mean, r;
        const double count = (double)group * num_positions;
        for (long c = first; c < first + group; c++) {
            const double one = inverse[c];
            total += one * of_y[c], square += one * one * of_y[channels + c];
        }
        group_moments(total, square, count, eps, &mean, &r);
        for (long c = first; c < first + group; c++) {
            const double along_u = r * (inverse[c] * along[channels + c] - mean * along[c]);
            vectors[4 * channels + c] += along_u;
            vectors[5 * channels + c] += along[c];
            e1 += gamma[c] * along[c] / count, e2 += gamma[c] * along_u / count;
        }
        const double slope_g = r * r * e2, shift_g = r * e1 - slope_g * mean;
        for (long c = first; c < first + group; c++) {
            const double one = inverse[c], scale = gamma[c] * r, of_x = one * of_y[c], of_square = one * one * of_y[channels + c];
            const double sum_h = scale * along[c] - shift_g * num_positions - slope_g * of_x;
            const double along_h = scale * one * along[channels + c] - shift_g * of_x - slope_g * of_square;
            double shift = shift_g, slope = slope_g;
            vectors[2 * channels + c] += along_h;
            vectors[3 * channels + c] += sum_h;
            if (state) {
                const double m1 = of_x / num_positions, m2 = of_square / num_positions, unit = 1 / (num_positions * (double)weight);
                const Correction taken = correction_of(prior, state, channels, c, m2);
                shift += weight * taken.shift, slope += weight * taken.slope;
                if (weight != 0) leave_over(state, taken, sum_h * unit, along_h * unit, m1, m2, channels, c);
            }
            map[c] = (REAL)(-one * shift);
            map[channels + c] = (REAL)(-one * one * slope);
            map[2 * channels + c] = (REAL)(one * scale);
        }
    }
}

/* grad_y becomes the gradient of y, which is `given`, and grad = g = grad_out * act'(z); vectors, (6, channels), gain what
   kernels/channel.py says. grad_y may be given itself, grad grad_out. Null: z with the identity; grad; grad_nll, which is then 0; prior
   and state. */
int backward_groups(const REAL *grad_out, const REAL *z, const REAL *given, const REAL *table, const REAL *sums,
                    const REAL *grad_nll, const REAL *gamma, long group, REAL eps, long num_images, long num_positions,
                    long channels, int activation, REAL slope, const REAL *prior, REAL *state, int threads,
                    REAL *grad_y, REAL *grad, REAL *vectors) {
    const Backward of = {grad_out, z, given, 0, table, channels, activation, 1, slope, grad_y, grad};
    const long height = rows_of_tile(channels), width = 2 * channels;
    const long image_bytes = num_positions * channels * (long)sizeof(REAL) * 3;
    const long some = num_images == 1 ? 1 : threads * (GROUP_BYTES > image_bytes ? GROUP_BYTES / image_bytes : 1);
    const REAL weight = grad_nll ? *grad_nll : 0;
    double *total = calloc(6 * channels + (some + threads) * width, sizeof(double)), *along = total + 6 * channels;
    double *shares = along + some * width;
    REAL *maps = calloc(some * 3 * channels, sizeof(REAL));
    const int failed = !total || !maps;
    for (long first = 0; !failed && first < num_images; first += some) {
        const long num = smaller(some, num_images - first);
        for (long i = 0; i < (some + threads) * width; i++) along[i] = 0;
        if (num == 1) { /* its tiles are shared */
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
            for (long top = 0; top < num_positions; top += height)
                backward_tile(&of, first * num_positions + top, first * num_positions + smaller(top + height, num_positions), 0,
                              table + SCALE * channels, shares + omp_get_thread_num() * width);
            add_threads(along, shares, width, threads);
        } else {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
            for (long n = 0; n < num; n++)
                for (long top = 0; top < num_positions; top += height)
                    backward_tile(&of, (first + n) * num_positions + top, (first + n) * num_positions + smaller(top + height, num_positions),
                                  0, table + SCALE * channels, along + n * width);
        }
        for (long n = 0; n < num; n++)
            groups_of_image(table, prior, state, weight, gamma, group, eps, num_positions, channels, along + n * width,
                            sums + (first + n) * width, maps + n * 3 * channels, total);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
        for (long n = 0; n < num; n++)
            for (long top = 0; top < num_positions; top += height) {
                const long begin = (first + n) * num_positions;
                const REAL *map = maps + n * 3 * channels;
                backward_tile(&of, begin + top, begin + smaller(top + height, num_positions), map, map + 2 * channels, 0);
            }
    }
    if (!failed) likelihood_back(table, sums, weight, num_images, num_positions, channels, vectors);
    for (long i = 2 * channels; !failed && i < 6 * channels; i++) vectors[i] += (REAL)total[i];
    free(total);
    free(maps);
    return failed;
}

/* ---- the probe after a step; norm/probe.py says what is computed ---- */

/* Rows of a following layer's table: FollowRow in norm/probe.py. */
enum { STD, OLD_VARIANCE, DRIFT, GAMMA, BETA };

/* y, in multiples of unit, becomes act(gamma * (x - mean) / std + beta + residual) with the mean and std that follow from its
   own sums, which go to found, (2, channels), the mean as its change. Null: residual; unit, which is then 1. */
int follow(REAL *y, const REAL *residual, const REAL *table, const REAL *unit, long num_images, long num_positions, long channels,
           int activation, REAL slope, REAL eps, int shared, int threads, REAL *found) {
    const long num_rows = num_images * num_positions;
    double *sums = calloc(8 * channels, sizeof(double)), *wasted = sums + 4 * channels;
    REAL *map = calloc(2 * channels, sizeof(REAL));
    int failed = !sums || !map || forward_rows(y, 0, 0, num_rows, channels, IDENTITY, 0, threads, 0, sums);
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
            const double ratio = sqrt((variance + guard) / (table[OLD_VARIANCE * channels + c] + guard));
            const double std = fmax(old_std * ratio, eps), change = m + table[DRIFT * channels + c];
            const double scale = table[GAMMA * channels + c] / std;
            found[c] = (REAL)change;
            found[channels + c] = (REAL)(isnan(old_std * ratio) ? old_std * ratio : std); /* fmax would hide it */
            map[SCALE * channels + c] = (REAL)(scale * (unit ? unit[c] : 1));
            map[SHIFT * channels + c] = (REAL)(table[BETA * channels + c] - scale * change);
        }
        failed = forward_rows(y, residual, map, num_rows, channels, activation, slope, threads, 0, wasted);
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
