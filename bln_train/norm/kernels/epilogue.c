/* What surrounds a folded convolution, in one or two passes over memory each way; native.py calls it, eager.py says what is computed.
   At the end, what standardised filters need.

   Tensors are rows, (num_images * num_positions, channels), with channels adjacent and a multiple of LANES. REAL is float or
   double. A tile of rows that fits the first cache is walked one vector of channels at a time, so that its sums stay in
   registers; sums of tiles are added up in double, and threads in their order: the same number of threads gives the same bits.
   What is called with an argument that may be null says so. Functions return 0, or 1 if memory ran out.
   The names of rows and HORIZON, LARGEST_SQUARE are those of table.py, defined by who compiles this. */

#include <math.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#include "vectors.h"

#define TILE 1024 /* entries of a tile, in each tensor */
#define MIN_ROWS 8
#define BLOCK_BYTES 262144 /* of a thread's images that are read twice: they are to stay in its second cache */

typedef __typeof__((vec){0} < (vec){0}) mask;

static inline vec choose(mask which, vec yes, vec no) { return (vec)((which & (mask)yes) | (~which & (mask)no)); }

static inline void add_to(double *sums, vec v) {
    for (long lane = 0; lane < LANES; lane++) sums[lane] += v[lane];
}

static long rows_of_tile(long channels) { return channels * MIN_ROWS > TILE ? MIN_ROWS : TILE / channels; }

/* Adds the threads' shares, (threads, length), to sums. */
static void add_threads(double *sums, const double *shares, long length, int threads) {
    for (int thread = 0; thread < threads; thread++)
        for (long i = 0; i < length; i++) sums[i] += shares[thread * length + i];
}

/* The groups of channels of a layer: how many channels each has, 0 for no groups, and what is added to its variance. */
typedef struct {
    long size;
    REAL eps;
} Groups;

/* ---- forward ---- */

/* Rows top to bottom, a tile: z becomes relu(scale * y + shift + residual) with the map, (2, channels), unless that is null; sums,
   (2, channels), gain those of y and y^2. Null: residual; map; sums. */
static void forward_tile(const REAL *y, REAL *z, const REAL *residual, const REAL *map, long top, long bottom, long channels, int relu,
                         double *sums) {
    const long begin = top * channels, end = bottom * channels;
    for (long c = 0; c < channels; c += LANES) {
        const vec zero = {0};
        const vec scale = map ? load(map + c) : zero, shift = map ? load(map + channels + c) : zero;
        vec sum = zero, square = zero;
        for (long i = begin + c; i < end; i += channels) {
            vec v = load(y + i);
            sum += v;
            square += v * v;
            if (!map) continue;
            v = v * scale + shift;
            if (residual) v += load(residual + i);
            if (relu) v = choose(v < zero, zero, v); /* in this order a NaN stays one */
            store(z + i, v);
        }
        if (sums) add_to(sums + c, sum), add_to(sums + channels + c, square);
    }
}

/* The tiles of all rows, shared by threads. */
static int forward_rows(const REAL *y, REAL *z, const REAL *residual, const REAL *map, long num_rows, long channels, int relu,
                        int threads, double *sums) {
    const long height = rows_of_tile(channels), width = 2 * channels;
    double *shares = sums ? calloc(threads * width, sizeof(double)) : 0;
    if (sums && !shares) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long top = 0; top < num_rows; top += height)
        forward_tile(y, z, residual, map, top, smaller(top + height, num_rows), channels, relu,
                     shares ? shares + omp_get_thread_num() * width : 0);
    if (sums) add_threads(sums, shares, width, threads);
    free(shares);
    return 0;
}

/* In this order a NaN stays one, which fmax would hide. */
static inline double at_least(double bound, double v) { return v < bound ? bound : v; }

/* m and r of a group, from the sums of xhat and of its square over `count` values. */
static void group_moments(double total, double square, double count, REAL eps, double *mean, double *scale) {
    *mean = total / count;
    *scale = 1 / sqrt(at_least(0, square / count - *mean * *mean) + eps);
}

/* The map of y, (2, channels), with groups, from an image's sums of y and y^2, (2, channels). */
static void map_of_groups(const double *sums, const REAL *table, Groups groups, long num_positions, long channels, REAL *map) {
    for (long first = 0; first < channels; first += groups.size) {
        double total = 0, square = 0, mean, r;
        for (long c = first; c < first + groups.size; c++) {
            const double inverse = table[INVERSE * channels + c];
            total += inverse * sums[c], square += inverse * inverse * sums[channels + c];
        }
        group_moments(total, square, (double)groups.size * num_positions, groups.eps, &mean, &r);
        for (long c = first; c < first + groups.size; c++) {
            const double scale = table[OUTER * channels + c] * r;
            map[c] = (REAL)(scale * table[INVERSE * channels + c]);
            map[channels + c] = (REAL)(table[SHIFT * channels + c] - scale * mean);
        }
    }
}

/* From each image's sums of y and y^2, seen, (num_images, 2, channels): to sums; those of the first num_probe are added to probe,
   (2, channels), and the likelihood to nll. Null: sums; probe, with a num_probe of 0; nll. */
static void give_sums(const double *seen, const REAL *table, long num_images, long num_positions, long channels, long num_probe,
                      REAL *sums, REAL *probe, REAL *nll) {
    double likelihood = 0;
    for (long n = 0; n < num_images; n++) {
        const double *own = seen + n * 2 * channels;
        for (long i = 0; sums && i < 2 * channels; i++) sums[n * 2 * channels + i] = (REAL)own[i];
        for (long i = 0; n < num_probe && i < 2 * channels; i++) probe[i] += (REAL)own[i];
        for (long c = 0; nll && c < channels; c++)
            likelihood += (double)table[NLL_SQUARE * channels + c] * own[channels + c] / num_positions +
                          (double)table[NLL_IMAGE * channels + c];
    }
    if (nll) *nll += (REAL)likelihood;
}

/* z becomes the epilogue of y, and may be y; sums, (num_images, 2, channels), those of y and y^2. Null: residual; sums; probe, with a
   num_probe of 0; nll. */
int forward(const REAL *y, REAL *z, const REAL *residual, const REAL *table, long group_size, REAL group_eps, long num_images,
            long num_positions, long channels, long num_probe, int relu, int threads, REAL *sums, REAL *probe, REAL *nll) {
    const Groups groups = {group_size, group_eps};
    const long size = num_positions * channels, height = rows_of_tile(channels), width = 2 * channels;
    double *seen = calloc(num_images * width, sizeof(double));
    REAL *maps = group_size ? calloc(threads * width, sizeof(REAL)) : 0;
    const REAL *map = maps ? maps : table + INNER * channels; /* SHIFT comes after INNER */
    int failed = !seen || (group_size && !maps);
    if (!failed && num_images == 1) { /* its tiles are shared */
        if (group_size) {
            failed = forward_rows(y, 0, 0, 0, num_positions, channels, 0, threads, seen);
            map_of_groups(seen, table, groups, num_positions, channels, maps);
        }
        failed = failed || forward_rows(y, z, residual, map, num_positions, channels, relu, threads, group_size ? 0 : seen);
    } else if (!failed) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long n = 0; n < num_images; n++) {
            const REAL *from = y + n * size, *other = residual ? residual + n * size : 0, *own_map = map;
            double *own = seen + n * width;
            if (group_size) {
                REAL *of_image = maps + omp_get_thread_num() * width;
                for (long top = 0; top < num_positions; top += height)
                    forward_tile(from, 0, 0, 0, top, smaller(top + height, num_positions), channels, 0, own);
                map_of_groups(own, table, groups, num_positions, channels, of_image);
                own_map = of_image;
            }
            for (long top = 0; top < num_positions; top += height)
                forward_tile(from, z + n * size, other, own_map, top, smaller(top + height, num_positions), channels, relu,
                             group_size ? 0 : own);
        }
    }
    if (!failed) give_sums(seen, table, num_images, num_positions, channels, num_probe, sums, probe, nll);
    free(seen);
    free(maps);
    return failed;
}

/* ---- backward ---- */

/* What surrounds one layer's output, for backward; its arguments. */
typedef struct {
    const REAL *grad_z, *z, *y, *table;
    long num_positions, channels;
    int relu, is_plain; /* is_plain: offset and gain of every map are 0 */
    REAL *grad_y, *grad;
} Backward;

/* Rows top to bottom of all images, a tile: adds sums of g and g * y to sums, (2, channels), and writes grad and
   grad_y = offset + gain * y + scale * g with the map, (3, channels). Null: sums; map, then nothing is written. */
static inline __attribute__((always_inline)) void backward_tile(const Backward *of, long top, long bottom, const REAL *map,
                                                                double *sums) {
    const long channels = of->channels, begin = top * channels, end = bottom * channels;
    for (long c = 0; c < channels; c += LANES) {
        const vec zero = {0};
        const vec offset = map ? load(map + c) : zero, gain = map ? load(map + channels + c) : zero;
        const vec scale = map ? load(map + 2 * channels + c) : zero;
        vec sum = zero, product = zero;
        for (long i = begin + c; i < end; i += channels) {
            vec g = load(of->grad_z + i);
            const vec y = load(of->y + i);
            if (of->relu) g = choose(load(of->z + i) <= zero, zero, g);
            sum += g;
            product += g * y;
            if (!map) continue;
            if (of->grad) store(of->grad + i, g);
            store(of->grad_y + i, of->is_plain ? g * scale : g * scale + offset + y * gain);
        }
        if (sums) add_to(sums + c, sum), add_to(sums + channels + c, product);
    }
}

/* What is taken out of one image's gradient in one channel, and by how much its regressors are scaled down: feedback.py. */
typedef struct {
    double shift, slope, damping;
} Taken;

/* What earlier batches and images say; running and state may both be null, for no correction. */
typedef struct {
    const REAL *running;
    REAL *state;
    REAL weight; /* of one image in the loss */
} Correction;

/* That of the image that comes next, whose mean of xhat^2 is `second`. */
static inline Taken taken_from(Correction of, long channels, long c, double second) {
    const double rest = at_least(HORIZON, of.state[TO_COME * channels + c]);
    const double damping = 1 / sqrt(at_least(1, (1 + second) / LARGEST_SQUARE));
    return (Taken){damping * (of.running[c] + of.state[LEFT_SHIFT * channels + c] / rest),
                   damping * (of.running[channels + c] + of.state[LEFT_SLOPE * channels + c] / rest), damping};
}

/* What the image leaves over, from its means of g, g * xhat, xhat and xhat^2. */
static inline void leave_over(REAL *state, Taken taken, double along_one, double along_xhat, double first, double second,
                              long channels, long c) {
    state[LEFT_SHIFT * channels + c] += (REAL)(taken.damping * (along_one - taken.shift - taken.slope * first));
    state[LEFT_SLOPE * channels + c] += (REAL)(taken.damping * (along_xhat - taken.shift * first - taken.slope * second));
    state[TO_COME * channels + c] -= 1;
}

/* The way back through one image, from its forward's sums of y and y^2, of_y, and its sums of g and g * y, along, (2, channels) each.
   Its map, (3, channels), is written. Then state goes on, and vectors gain the gradients of weights and biases.
   Null: map, to leave the first out; along, to leave the second out, which groups need for both. */
static void back_through_image(const Backward *of, Groups groups, Correction correction, const REAL *of_y, const double *along,
                               REAL *map, double *vectors) {
    const long channels = of->channels, size = groups.size ? groups.size : 1;
    const REAL *table = of->table;
    const double count = (double)size * of->num_positions, positions = of->num_positions;
    for (long first = 0; first < channels; first += size) {
        double mean = 0, r = 1, shift_g = 0, slope_g = 0;
        if (groups.size) {
            double total = 0, square = 0, e1 = 0, e2 = 0;
            for (long c = first; c < first + size; c++) {
                const double inverse = table[INVERSE * channels + c];
                total += inverse * of_y[c], square += inverse * inverse * of_y[channels + c];
            }
            group_moments(total, square, count, groups.eps, &mean, &r);
            for (long c = first; c < first + size; c++) {
                const double outer = table[OUTER * channels + c];
                const double along_u = r * (table[INVERSE * channels + c] * along[channels + c] - mean * along[c]);
                vectors[4 * channels + c] += along_u;
                vectors[5 * channels + c] += along[c];
                e1 += outer * along[c] / count, e2 += outer * along_u / count;
            }
            slope_g = r * r * e2, shift_g = r * e1 - slope_g * mean;
        }
        for (long c = first; c < first + size; c++) {
            const double inverse = table[INVERSE * channels + c], inner = table[INNER * channels + c];
            const double of_g = groups.size ? table[OUTER * channels + c] * r : 1; /* h = of_g * g - shift - slope * xhat */
            const double of_x = inverse * of_y[c], of_square = inverse * inverse * of_y[channels + c];
            double shift = shift_g, slope = slope_g;
            Taken taken = {0, 0, 1};
            if (correction.state) {
                taken = taken_from(correction, channels, c, of_square / positions);
                shift += correction.weight * taken.shift, slope += correction.weight * taken.slope;
            }
            if (map) {
                map[c] = (REAL)(-inner * shift);
                map[channels + c] = (REAL)(-inner * inverse * slope);
                map[2 * channels + c] = (REAL)(inner * of_g);
            }
            if (!along) continue;
            double sum_h = of_g * along[c], along_h = of_g * inverse * along[channels + c];
            if (groups.size) { /* of 0 * infinity a NaN would come */
                sum_h -= shift_g * positions + slope_g * of_x;
                along_h -= shift_g * of_x + slope_g * of_square;
            }
            vectors[2 * channels + c] += along_h;
            vectors[3 * channels + c] += sum_h;
            if (!correction.state || correction.weight == 0) continue;
            const double unit = 1 / (positions * (double)correction.weight);
            leave_over(correction.state, taken, sum_h * unit, along_h * unit, of_x / positions, of_square / positions, channels, c);
        }
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

/* grad_y becomes the gradient of y, and grad = g = grad_z * relu'(z); the correction's state, (3, channels), goes on from image to
   image; vectors, (4, channels), or (6, channels) with groups, gain what table.py says. sums are those of the forward. grad_y may be
   y or grad_z itself, grad may be grad_z. Null: z without relu; grad; loss_weight, which is then 0; running and state.

   One pass where the maps are known before g is: without groups, of one image or without a correction. Else the sums come first, for
   as many images as stay in the caches. */
int backward(const REAL *grad_z, const REAL *z, const REAL *y, const REAL *table, const REAL *sums, const REAL *loss_weight,
             long group_size, REAL group_eps, long num_images, long num_positions, long channels, int relu, const REAL *running,
             REAL *state, int threads, REAL *grad_y, REAL *grad, REAL *vectors) {
    const Groups groups = {group_size, group_eps};
    const Correction correction = {running, state, loss_weight ? *loss_weight : 0};
    const Backward of = {grad_z, z, y, table, num_positions, channels, relu, !state && !group_size, grad_y, grad};
    const long height = rows_of_tile(channels), num_rows = num_images * num_positions, width = 2 * channels;
    const int apart = group_size || (state && num_images > 1);
    const long image_bytes = num_positions * channels * (long)sizeof(REAL) * (2 + relu);
    const long fits = BLOCK_BYTES > image_bytes ? BLOCK_BYTES / image_bytes : 1;
    const long block = !apart || num_images == 1 ? 1 : threads * fits;
    double *total = calloc(6 * channels + (block + threads) * width, sizeof(double)), *along = total + 6 * channels;
    double *shares = along + block * width;
    REAL *maps = calloc(block * 3 * channels, sizeof(REAL));
    const int failed = !total || !maps;
    if (!failed && !apart) {
        back_through_image(&of, groups, correction, sums, 0, maps, total);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long top = 0; top < num_rows; top += height)
            backward_tile(&of, top, smaller(top + height, num_rows), maps, shares + omp_get_thread_num() * width);
        add_threads(along, shares, width, threads);
        back_through_image(&of, groups, correction, sums, along, 0, total);
    }
    for (long first = 0; !failed && apart && first < num_images; first += block) {
        const long num = smaller(block, num_images - first);
        for (long i = 0; i < (block + threads) * width; i++) along[i] = 0;
        if (num == 1) { /* its tiles are shared */
            const long begin = first * num_positions;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
            for (long top = 0; top < num_positions; top += height)
                backward_tile(&of, begin + top, begin + smaller(top + height, num_positions), 0, shares + omp_get_thread_num() * width);
            add_threads(along, shares, width, threads);
        } else {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
            for (long n = 0; n < num; n++)
                for (long top = 0; top < num_positions; top += height) {
                    const long begin = (first + n) * num_positions;
                    backward_tile(&of, begin + top, begin + smaller(top + height, num_positions), 0, along + n * width);
                }
        }
        for (long n = 0; n < num; n++)
            back_through_image(&of, groups, correction, sums + (first + n) * width, along + n * width, maps + n * 3 * channels, total);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
        for (long n = 0; n < num; n++)
            for (long top = 0; top < num_positions; top += height) {
                const long begin = (first + n) * num_positions;
                backward_tile(&of, begin + top, begin + smaller(top + height, num_positions), maps + n * 3 * channels, 0);
            }
    }
    if (!failed && loss_weight) likelihood_back(table, sums, correction.weight, num_images, num_positions, channels, vectors);
    for (long i = 2 * channels; !failed && i < (group_size ? 6 : 4) * channels; i++) vectors[i] += (REAL)total[i];
    free(total);
    free(maps);
    return failed;
}

/* ---- the probe after a step; norm/probe.py says what is computed ---- */

/* y, in multiples of unit, becomes relu(gamma * (x - mean) / std + beta + residual) with the mean and std that follow from its own
   sums, which go to found, (2, channels), the mean as its change. table: (5, channels), ProbeRow of table.py. Null: residual; unit,
   which is then 1. */
int follow(REAL *y, const REAL *residual, const REAL *table, const REAL *unit, long num_images, long num_positions, long channels,
           int relu, REAL eps, int threads, REAL *found) {
    const long num_rows = num_images * num_positions;
    double *sums = calloc(2 * channels, sizeof(double));
    REAL *map = calloc(2 * channels, sizeof(REAL));
    int failed = !sums || !map || forward_rows(y, 0, 0, 0, num_rows, channels, 0, threads, sums);
    for (long c = 0; !failed && c < channels; c++) {
        const double one = unit ? unit[c] : 1, shift = sums[c] * one / num_rows;
        const double variance = at_least(0, sums[channels + c] * one * one / num_rows - shift * shift);
        const double old_std = table[STD * channels + c], guard = (1e-4 + 1.0 / num_rows) * old_std * old_std;
        const double ratio = sqrt((variance + guard) / (table[OLD_VARIANCE * channels + c] + guard));
        const double std = at_least(eps, old_std * ratio), change = shift + table[DRIFT * channels + c];
        const double scale = table[GAMMA * channels + c] / std;
        found[c] = (REAL)change;
        found[channels + c] = (REAL)std;
        map[c] = (REAL)(scale * one);
        map[channels + c] = (REAL)(table[BETA * channels + c] - scale * change);
    }
    failed = failed || forward_rows(y, y, residual, map, num_rows, channels, relu, threads, 0);
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
