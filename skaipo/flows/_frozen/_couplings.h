// Couplings of images, once per instruction set: included by _couplings.cpp in a namespace each,
// with VECTOR, the bytes of a register, and ACCUMULATORS, how many of them sums may take.
//
// Channels lie innermost. Between the layers each pixel has a multiple of 16 channels, and what a
// layer reads has a border of zeros as wide as its kernel needs, so that no loop asks where it is.
// A pixel's sum takes its products in the same order wherever it stands in a block, whichever
// thread computes it and whatever the batch: a row's results are the same bits in any company.

template <class T> struct Vectors {
    static constexpr int lanes = VECTOR / sizeof(T);
    typedef T type __attribute__((vector_size(VECTOR), aligned(alignof(T)), may_alias));
};

template <class T> static inline __attribute__((always_inline)) typename Vectors<T>::type
load(const T *p) {
    return *(const typename Vectors<T>::type *)p;
}

template <class T, class V> static inline __attribute__((always_inline)) void store(T *p, V v) {
    *(V *)p = v;
}

// What becomes of a sum: it is rectified, stopped where a forward pass was not positive, or kept.
enum Ending { RECTIFIED, GATED, PLAIN };

// Where a layer reads and writes. Pixel (y, x) begins at y * row + x * channels.
template <class T> struct Picture {
    T *origin;
    int64_t row, channels;
};

// P pixels, G groups of 16 outputs each.
template <class T, int P, int G, Ending ending>
static inline __attribute__((always_inline)) void
block(const Layer &layer, int64_t group, const T *const *inputs, int64_t row, int64_t channels,
      T *const *outputs, int8_t *const *gates) {
    typedef typename Vectors<T>::type V;
    constexpr int lanes = Vectors<T>::lanes, per_group = 16 / lanes, N = G * per_group;
    typedef decltype(V{} <= V{}) Mask;
    typedef int8_t Bytes __attribute__((vector_size(lanes), aligned(1), may_alias));
    const int64_t stride = layer.kernel_height * layer.kernel_width * layer.n_inputs * 16;
    const T *weight = (const T *)layer.weight + group * stride;
    V sums[P][N];
    for (int n = 0; n < N; n++) {
        V bias = {};
        if (layer.bias)
            bias = load((const T *)layer.bias + group * 16 + n * lanes);
        for (int p = 0; p < P; p++)
            sums[p][n] = bias;
    }
    for (int64_t ky = 0; ky < layer.kernel_height; ky++)
        for (int64_t kx = 0; kx < layer.kernel_width; kx++) {
            const int64_t offset = ky * row + kx * channels;
            for (int64_t c = 0; c < layer.n_inputs; c++, weight += 16) {
                V w[N];
#pragma GCC unroll 16
                for (int n = 0; n < N; n++)
                    w[n] = load(weight + n / per_group * stride + n % per_group * lanes);
#pragma GCC unroll 16
                for (int p = 0; p < P; p++) {
                    const T h = inputs[p][offset + c];
#pragma GCC unroll 16
                    for (int n = 0; n < N; n++)
                        sums[p][n] += w[n] * h;
                }
            }
        }
    for (int p = 0; p < P; p++)
        for (int n = 0; n < N; n++) {
            const int64_t at = group * 16 + n * lanes;
            V v = sums[p][n];
            if (ending == RECTIFIED) {
                const Mask stopped = v <= 0; // NaN is not
                v = stopped ? V{} : v;
                if (gates)
                    *(Bytes *)(gates[p] + at) = __builtin_convertvector(~stopped, Bytes);
            }
            if (ending == GATED)
                v = (V)((Mask)v & __builtin_convertvector(*(const Bytes *)(gates[p] + at), Mask));
            store(outputs[p] + at, v);
        }
}

// Pixels first to last, in the order of their rows.
template <class T, int P, int G, Ending ending>
static __attribute__((noinline)) void
blocks(const Layer &layer, int64_t group, Picture<T> in, Picture<T> out, int8_t *gates,
                   int64_t width, int64_t first, int64_t last) {
    const int64_t n_gates = round_up(layer.n_outputs);
    const T *inputs[P];
    T *outputs[P];
    int8_t *gate[P];
    for (int64_t start = first; start < last; start += P) {
        // The last block overlaps the one before it: both write the same numbers.
        if (start + P > last)
            start = last - P;
        for (int p = 0; p < P; p++) {
            const int64_t y = (start + p) / width, x = (start + p) % width;
            inputs[p] = in.origin + y * in.row + x * in.channels;
            outputs[p] = out.origin + y * out.row + x * out.channels;
            gate[p] = gates ? gates + (start + p) * n_gates : nullptr;
        }
        block<T, P, G, ending>(layer, group, inputs, in.row, in.channels, outputs,
                               gates ? gate : nullptr);
    }
}

template <class T, int G, Ending ending>
static void groups(const Layer &layer, int64_t group, Picture<T> in, Picture<T> out, int8_t *gates,
                   int64_t width, int64_t first, int64_t last) {
    constexpr int fit = ACCUMULATORS / (G * 16 / Vectors<T>::lanes);
    constexpr int P = fit > 12 ? 10 : fit < 1 ? 1 : fit; // ten pointers stay in registers
    constexpr int few = P > 4 ? 4 : 1;
    if (last - first >= P)
        blocks<T, P, G, ending>(layer, group, in, out, gates, width, first, last);
    else if (last - first >= few)
        blocks<T, few, G, ending>(layer, group, in, out, gates, width, first, last);
    else
        blocks<T, 1, G, ending>(layer, group, in, out, gates, width, first, last);
}

template <class T, Ending ending>
static void convolve(const Layer &layer, Picture<T> in, Picture<T> out, int8_t *gates,
                     int64_t width, int64_t first, int64_t last) {
    if (first >= last)
        return;
    int64_t group = 0, n = round_up(layer.n_outputs) / 16;
    constexpr int most = ACCUMULATORS * Vectors<T>::lanes / 16 >= 16 ? 4 : 2;
    for (; most == 4 && n - group >= 4; group += 4)
        groups<T, most, ending>(layer, group, in, out, gates, width, first, last);
    for (; most == 4 && n - group == 3; group += 3)
        groups<T, most == 4 ? 3 : 1, ending>(layer, group, in, out, gates, width, first, last);
    for (; n - group >= 2; group += 2)
        groups<T, 2, ending>(layer, group, in, out, gates, width, first, last);
    for (; n - group >= 1; group += 1)
        groups<T, 1, ending>(layer, group, in, out, gates, width, first, last);
}

// ------------------------------------------------------------------- exponential and tangent

// After Moshier's Cephes library, to two units in the last place; NaN stays NaN.
typedef Vectors<float>::type Floats;
typedef int32_t Ints __attribute__((vector_size(VECTOR), aligned(4), may_alias));

static inline __attribute__((always_inline)) Floats exponential(Floats x) {
    x = x > 88.0f ? Floats{} + 88.0f : x;
    x = x < -87.0f ? Floats{} - 87.0f : x;
    const float magic = 12582912.0f; // 1.5 * 2**23: adding it rounds to an integer
    Floats shifted = x * 1.44269504088896341f + magic;
    Floats n = shifted - magic;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Floats scaled = (Floats)((Ints)p + ((Ints)shifted << 23));
    return x == x ? scaled : x; // a NaN's payload would be taken for an exponent
}

static inline __attribute__((always_inline)) Floats tangent(Floats x) {
    Floats size = x < 0 ? -x : x, z = x * x;
    Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = p * z * x + x;
    Floats large = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    large = x < 0 ? -large : large;
    return size < 0.625f ? p : large;
}

static void tangents(float *values, int64_t n) {
    constexpr int lanes = Vectors<float>::lanes;
    float rest[lanes] = {};
    for (; n >= lanes; n -= lanes, values += lanes)
        store(values, tangent(load(values)));
    std::memcpy(rest, values, n * sizeof(float));
    store(rest, tangent(load(rest)));
    std::memcpy(values, rest, n * sizeof(float));
}

static void exponentials(const float *values, float bound, float *results, int64_t n) {
    constexpr int lanes = Vectors<float>::lanes;
    float rest[lanes] = {};
    for (; n >= lanes; n -= lanes, values += lanes, results += lanes)
        store(results, exponential(load(values) * bound));
    std::memcpy(rest, values, n * sizeof(float));
    store(rest, exponential(load(rest) * bound));
    std::memcpy(results, rest, n * sizeof(float));
}

// The other precision is for comparisons.
static void tangents(double *values, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        values[i] = std::tanh(values[i]);
}

static void exponentials(const double *values, double bound, double *results, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        results[i] = std::exp(bound * values[i]);
}

template <class T> static T sum(const T *values, int64_t n) {
    constexpr int lanes = Vectors<T>::lanes;
    typename Vectors<T>::type sums = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        sums += load(values + i);
    T total = 0;
    for (; i < n; i++)
        total += values[i];
    for (int k = 0; k < lanes; k++)
        total += sums[k];
    return total;
}

// ------------------------------------------------------------------------- one image's coupling

// The pictures between the layers of a network, in one piece of memory.
template <class T> struct Pictures {
    Picture<T> at[MAX_LAYERS + 1];   // where layer i reads; the last one's output
    Picture<T> inside[MAX_LAYERS + 1]; // the same without the border
    int64_t size;                    // in numbers

    Pictures(const Coupling &c, const Layer *layers, T *memory) : size(0) {
        for (int i = 0; i <= c.n_layers; i++) {
            const bool end = i == c.n_layers;
            const int64_t channels = round_up(end ? layers[i - 1].n_outputs : layers[i].n_inputs);
            const int64_t top = end ? 0 : layers[i].kernel_height / 2;
            const int64_t left = end ? 0 : layers[i].kernel_width / 2;
            const int64_t row = (c.width + 2 * left) * channels;
            at[i] = {memory + size, row, channels};
            inside[i] = {memory + size + top * row + left * channels, row, channels};
            size += (c.height + 2 * top) * row;
        }
    }

    void clear_borders(const Coupling &c) const {
        for (int i = 0; i < c.n_layers; i++) {
            // As many numbers as before the first pixel follow the last one.
            const int64_t around = inside[i].origin - at[i].origin, row = at[i].row;
            const int64_t gap = row - c.width * at[i].channels;
            T *p = inside[i].origin;
            std::memset(at[i].origin, 0, around * sizeof(T));
            for (int64_t y = 1; y < c.height; y++) // the end of a row and the beginning of the next
                std::memset(p + y * row - gap, 0, gap * sizeof(T));
            std::memset(p + c.height * row - gap, 0, around * sizeof(T));
        }
    }
};

template <class T> static inline T *pixel(Picture<T> picture, int64_t p, int64_t width) {
    return picture.origin + p / width * picture.row + p % width * picture.channels;
}

template <class T, Ending ending>
static void run_layers(const Coupling &c, const Layer *layers, const Pictures<T> &pictures,
                       int8_t *const *gates, const Share &share) {
    for (int i = 0; i < c.n_layers; i++) {
        const bool last = i + 1 == c.n_layers;
        if (last)
            convolve<T, PLAIN>(layers[i], pictures.at[i], pictures.inside[i + 1], nullptr, c.width,
                               share.first, share.last);
        else
            convolve<T, ending>(layers[i], pictures.at[i], pictures.inside[i + 1],
                                gates ? gates[i] : nullptr, c.width, share.first, share.last);
        share.wait();
    }
}

template <class T>
static void map_image(const Call &call, int64_t image, T *memory, const Share &share) {
    const Coupling &c = *call.coupling;
    const int64_t pixels = c.height * c.width, size = c.size;
    T *h = (T *)call.h + image * pixels * c.channels;
    T *kept = (T *)call.kept + image * pixels * size;
    T *tanh = (T *)call.tanh + image * pixels * size;
    T *factor = (T *)call.factor + image * pixels * size;
    const T *mask = (const T *)c.mask;
    Pictures<T> pictures(c, c.layers, memory);
    if (share.leads)
        pictures.clear_borders(c);
    for (int64_t p = share.first; p < share.last; p++) {
        const T *source = h + p * c.channels + c.source;
        T *input = pixel(pictures.inside[0], p, c.width);
        for (int64_t k = 0; k < c.n_source; k++)
            input[k] = mask ? source[k] * mask[p * c.n_source + k] : source[k];
    }
    share.wait();

    int8_t *gates[MAX_LAYERS];
    for (int i = 0; i + 1 < c.n_layers; i++)
        if (call.gates[i])
            gates[i] = (int8_t *)call.gates[i] + image * pixels * round_up(c.layers[i].n_outputs);
    run_layers<T, RECTIFIED>(c, c.layers, pictures, call.gates[0] ? gates : nullptr, share);

    const Picture<T> output = pictures.inside[c.n_layers];
    for (int64_t p = share.first; p < share.last; p++) {
        T *raw = output.origin + p * output.channels;
        if (mask)
            for (int64_t k = 0; k < size; k++) {
                raw[k] *= 1 - mask[p * size + k];
                raw[size + k] *= 1 - mask[p * size + k];
            }
        for (int64_t k = 0; k < size; k++)
            tanh[p * size + k] = raw[k];
    }
    const int64_t start = share.first * size, count = (share.last - share.first) * size;
    if (count > 0) {
        tangents(tanh + start, count);
        exponentials(tanh + start, (T)c.bound, factor + start, count);
    }
    for (int64_t p = share.first; p < share.last; p++) {
        T *target = h + p * c.channels + c.target;
        const T *shift = output.origin + p * output.channels + size;
        for (int64_t k = 0; k < size; k++) {
            const int64_t j = p * size + k;
            if (call.divide) {
                const T rest = target[k] - shift[k];
                target[k] = rest / factor[j];
                // See _Coupling._kept: without a sum to add to, this is the way back.
                kept[j] = call.log_det ? target[k] : rest;
            } else {
                const T scaled = target[k] * factor[j];
                kept[j] = call.log_det ? scaled : target[k];
                target[k] = scaled + shift[k];
            }
        }
    }
    if (!call.log_det)
        return;
    share.wait();
    if (share.leads)
        ((T *)call.log_det)[image * call.log_det_stride] = sum(tanh, pixels * size);
}

template <class T>
static void pull_image(const Call &call, int64_t row, T *memory, const Share &share) {
    const Coupling &c = *call.coupling;
    const int64_t pixels = c.height * c.width, size = c.size, image = row % call.rows;
    T *g = (T *)call.h + row * pixels * c.channels;
    const T *kept = (const T *)call.kept + image * pixels * size;
    const T *tanh = (const T *)call.tanh + image * pixels * size;
    const T *factor = (const T *)call.factor + image * pixels * size;
    const T *mask = (const T *)c.mask;
    const T weight = ((const T *)call.weights)[row];
    Pictures<T> pictures(c, c.back, memory);
    if (share.leads)
        pictures.clear_borders(c);
    for (int64_t p = share.first; p < share.last; p++) {
        T *target = g + p * c.channels + c.target;
        T *d_raw = pixel(pictures.inside[0], p, c.width), *d_shift = d_raw + size;
        for (int64_t k = 0; k < size; k++) {
            const int64_t j = p * size + k;
            // For x = (y - t) exp(-s), log-determinant -s, both with the sign turned.
            d_raw[k] = (weight + target[k] * kept[j]) * (1 - tanh[j] * tanh[j]);
            if (call.divide) {
                target[k] /= factor[j];
                d_shift[k] = target[k];
            } else {
                d_shift[k] = target[k];
                target[k] *= factor[j];
            }
        }
        if (mask)
            for (int64_t k = 0; k < size; k++) {
                d_raw[k] *= 1 - mask[p * size + k];
                d_shift[k] *= 1 - mask[p * size + k];
            }
    }
    share.wait();

    int8_t *gates[MAX_LAYERS];
    for (int i = 0; i + 1 < c.n_layers; i++)
        gates[i] = (int8_t *)call.gates[c.n_layers - 2 - i]
                   + image * pixels * round_up(c.back[i].n_outputs);
    run_layers<T, GATED>(c, c.back, pictures, gates, share);

    const Picture<T> output = pictures.inside[c.n_layers];
    for (int64_t p = share.first; p < share.last; p++) {
        T *source = g + p * c.channels + c.source;
        const T *more = output.origin + p * output.channels;
        for (int64_t k = 0; k < c.n_source; k++) {
            const T part = mask ? more[k] * mask[p * c.n_source + k] : more[k];
            source[k] += call.divide ? -part : part;
        }
    }
}

template <class T>
static void run_image(const Call &call, int64_t row, void *memory, const Share &share) {
    if (call.pull)
        pull_image<T>(call, row, (T *)memory, share);
    else
        map_image<T>(call, row, (T *)memory, share);
}
