// Affine couplings of images with their networks, forwards and backwards: see _native.py.
//
// An image goes through a whole coupling in one thread, in memory that stays in that core's cache.
// The rest of a batch that is no multiple of the threads is shared by all of them, pixel by pixel.

#ifdef __clang__
#error "clang ignores the pragmas that choose instructions; without this torch's kernels are used"
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int MAX_LAYERS = 8;

struct Layer {
    const void *weight; // (groups of 16 outputs, height, width, inputs, 16)
    const void *bias;   // a multiple of 16 numbers, or null
    int64_t kernel_height, kernel_width, n_inputs, n_outputs;
};

struct Coupling {
    const Layer *layers, *back;
    int64_t n_layers, height, width, channels, source, n_source, target, size;
    double bound;
    const void *mask; // (height, width, channels), or null
};

struct Call {
    const Coupling *coupling;
    int64_t rows, times, is_double, pull, divide, threads, instructions;
    void *h, *kept, *tanh, *factor, *log_det;
    int64_t log_det_stride;
    const void *weights;
    void *gates[MAX_LAYERS];
};

// A thread's share of an image, and how it waits for the others'.
struct Share {
    int64_t first, last;
    bool leads, alone;
    void wait() const {
#ifdef _OPENMP
        if (!alone) {
#pragma omp barrier
        }
#endif
    }
};

inline int64_t round_up(int64_t channels) { return (channels + 15) / 16 * 16; }

namespace basic {
#define VECTOR 16
#define ACCUMULATORS 8
#include "_couplings.h"
#undef VECTOR
#undef ACCUMULATORS
} // namespace basic

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR 32
#define ACCUMULATORS 12
#include "_couplings.h"
#undef VECTOR
#undef ACCUMULATORS
} // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR 64
#define ACCUMULATORS 24
#include "_couplings.h"
#undef VECTOR
#undef ACCUMULATORS
} // namespace avx512
#pragma GCC pop_options
#endif

void run_image(const Call &call, int64_t row, void *memory, const Share &share) {
#ifdef __x86_64__
    if (call.instructions == 2)
        return call.is_double ? avx512::run_image<double>(call, row, memory, share)
                              : avx512::run_image<float>(call, row, memory, share);
    if (call.instructions == 1)
        return call.is_double ? avx2::run_image<double>(call, row, memory, share)
                              : avx2::run_image<float>(call, row, memory, share);
#endif
    return call.is_double ? basic::run_image<double>(call, row, memory, share)
                          : basic::run_image<float>(call, row, memory, share);
}

// Memory that a thread keeps from call to call.
struct Memory {
    void *start = nullptr;
    size_t size = 0;
    ~Memory() { std::free(start); }
    void *of(size_t bytes) {
        if (bytes > size) {
            std::free(start);
            start = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
            size = start ? bytes : 0;
        }
        return start;
    }
};
thread_local Memory mine;

} // namespace

extern "C" {

// The best set of instructions that this processor has: 0, 1 (AVX2) or 2 (AVX-512).
int64_t skaipo_instructions() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

// Of the sources that this was compiled from.
uint32_t skaipo_checksum() { return SKAIPO_CHECKSUM; }

// 0, or 1 if there is no memory.
int64_t skaipo_couple(const Call *pointer) {
    const Call &call = *pointer;
    const Coupling &c = *call.coupling;
    const Layer *layers = call.pull ? c.back : c.layers;
    size_t numbers = basic::Pictures<double>(c, layers, nullptr).size;
    const size_t bytes = numbers * (call.is_double ? 8 : 4);
    const int64_t n = call.rows * call.times, pixels = c.height * c.width;
    int failed = 0;
    void *shared = nullptr;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)call.threads)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
#else
    {
        const int64_t team = 1, me = 0;
#endif
        void *memory = mine.of(bytes);
        if (me == 0)
            shared = memory;
        if (!memory) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = 1;
        }
#ifdef _OPENMP
#pragma omp barrier
#endif
        if (!failed) {
            const int64_t whole = n / team * team;
            const Share all = {0, pixels, true, true};
            for (int64_t row = me * (whole / team); row < (me + 1) * (whole / team); row++)
                run_image(call, row, memory, all);
            const Share part = {me * pixels / team, (me + 1) * pixels / team, me == 0, team == 1};
            for (int64_t row = whole; row < n; row++) {
                // The first thread's memory must be free of its own rows, and of the last one.
                part.wait();
                run_image(call, row, shared, part);
            }
        }
    }
    return failed;
}
}
