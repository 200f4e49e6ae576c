// How fast this machine moves memory: the roofline that benchmarks/bandwidth.py reports. It is C++
// with no Numba in it, so that it is an independent witness of what Numba's kernels could reach.
//
//   g++ -O3 -march=native -fopenmp -shared -fPIC bandwidth_harness.cpp
//
// Each probe runs `reps` times over n floats, split among the threads in contiguous 64-byte lines.
// Pointers are 64-byte aligned and n is a multiple of 16.

#include <omp.h>

#include <algorithm>
#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

// One cache line as the compiler's own vector type: one register with AVX-512, two with AVX,
// four with SSE or NEON.
typedef float Line __attribute__((vector_size(64)));
constexpr int64_t line_floats = 16;

inline void store_streaming(Line *p, Line v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float *>(p), (__m512)v);
#elif defined(__AVX__)
    const __m256 *half = reinterpret_cast<const __m256 *>(&v);
    _mm256_stream_ps(reinterpret_cast<float *>(p), half[0]);
    _mm256_stream_ps(reinterpret_cast<float *>(p) + 8, half[1]);
#elif defined(__SSE__)
    const __m128 *quarter = reinterpret_cast<const __m128 *>(&v);
    for (int i = 0; i < 4; ++i) _mm_stream_ps(reinterpret_cast<float *>(p) + 4 * i, quarter[i]);
#else
    *p = v;
#endif
}

inline void store_plain(Line *p, Line v) { *p = v; }

inline void fence() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

struct Range {
    int64_t begin, end;
};

Range my_lines(int64_t n) {
    const int64_t lines = n / line_floats, threads = omp_get_num_threads();
    const int64_t share = (lines + threads - 1) / threads;
    const int64_t begin = std::min(lines, omp_get_thread_num() * share);
    return {begin, std::min(lines, begin + share)};
}

template <typename Body>
void repeat(int64_t n, int64_t reps, int threads, Body body) {
    for (int64_t r = 0; r < reps; ++r) {
#pragma omp parallel num_threads(threads)
        body(my_lines(n));
    }
}

const Line *lines(const float *p) { return reinterpret_cast<const Line *>(p); }
Line *lines(float *p) { return reinterpret_cast<Line *>(p); }

}  // namespace

extern "C" {

// 1 read. Four sums at once, so that the latency of an addition does not limit it. The sums are kept
// per thread and written out, or the compiler would drop the loop.
void bw_read(const float *a, float *sums, int64_t n, int64_t reps, int threads) {
    repeat(n, reps, threads, [=](Range range) {
        const Line *src = lines(a);
        Line s0 = {}, s1 = {}, s2 = {}, s3 = {};
        int64_t i = range.begin;
        for (; i + 4 <= range.end; i += 4) {
            s0 += src[i];
            s1 += src[i + 1];
            s2 += src[i + 2];
            s3 += src[i + 3];
        }
        for (; i < range.end; ++i) s0 += src[i];
        const Line s = (s0 + s1) + (s2 + s3);
        float total = 0;
        for (int j = 0; j < line_floats; ++j) total += s[j];
        sums[omp_get_thread_num() * line_floats] = total;
    });
}

// 1 read, 1 write.
void bw_copy(const float *a, float *out, int64_t n, int64_t reps, int threads) {
    repeat(n, reps, threads, [=](Range range) {
        // The factor keeps the compiler from calling memcpy, which streams by rules of its own.
        for (int64_t i = range.begin; i < range.end; ++i)
            store_plain(lines(out) + i, lines(a)[i] * 0.5f);
    });
}

void bw_copy_streaming(const float *a, float *out, int64_t n, int64_t reps, int threads) {
    repeat(n, reps, threads, [=](Range range) {
        for (int64_t i = range.begin; i < range.end; ++i)
            store_streaming(lines(out) + i, lines(a)[i] * 0.5f);
        fence();
    });
}

// 2 reads, 1 write.
void bw_triad(const float *a, const float *b, float *out, int64_t n, int64_t reps, int threads) {
    repeat(n, reps, threads, [=](Range range) {
        for (int64_t i = range.begin; i < range.end; ++i)
            store_plain(lines(out) + i, lines(a)[i] + lines(b)[i] * 0.5f);
    });
}

void bw_triad_streaming(
        const float *a, const float *b, float *out, int64_t n, int64_t reps, int threads) {
    repeat(n, reps, threads, [=](Range range) {
        for (int64_t i = range.begin; i < range.end; ++i)
            store_streaming(lines(out) + i, lines(a)[i] + lines(b)[i] * 0.5f);
        fence();
    });
}
}
