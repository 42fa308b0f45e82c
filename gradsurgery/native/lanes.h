// What the kernels share: vectors of float32 numbers, read and written as float32 or bfloat16, and threads.
//
// Sums are taken in 16 lanes whatever the processor's registers are.

#pragma once

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = kLanes / kNative;
constexpr int64_t kBlock = 1024;  // numbers that are summed in float32: 64 a lane

typedef float Floats __attribute__((vector_size(4 * kNative)));
typedef uint32_t Bits __attribute__((vector_size(4 * kNative)));
typedef uint16_t Halves __attribute__((vector_size(2 * kNative)));
typedef int32_t Mask __attribute__((vector_size(4 * kNative)));
typedef uint16_t Bfloat;

static inline Floats load(const float* from) {
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline Floats load(const Bfloat* from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    Floats values;
    memcpy(&values, &bits, sizeof values);
    return values;
}

static inline void store(float* to, const Floats& values) { memcpy(to, &values, sizeof values); }

// A bfloat16 in the upper half of each number: to the nearest, ties to even; a NaN stays one.
static inline Bits rounded(const Floats& values) {
    Bits bits;
    memcpy(&bits, &values, sizeof bits);
    const Bits nan = (Bits)(values != values);
    return (nan & 0x7fc00000) | (~nan & (bits + 0x7fff + ((bits >> 16) & 1)));
}

static inline void store(Bfloat* to, const Floats& values) {
    const Halves halves = __builtin_convertvector(rounded(values) >> 16, Halves);
    memcpy(to, &halves, sizeof halves);
}

static inline Floats all(float value) { return value - Floats{}; }
static inline Floats choose(Mask mask, Floats one, Floats other) { return mask ? one : other; }

// exp(x), x <= 0 or NaN, within a unit in the last place; 0 where float32 has no denormal number as small.
static inline Floats exponential(Floats x) {
    x = choose(x < all(-110.0f), all(-110.0f), x);
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // its last bits are x / log 2, rounded
    const Floats whole = shifted - 12582912.0f;
    const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    const Floats tail = (((0.00137513818f * r + 0.00836892333f) * r + 0.0416695327f) * r + 0.166665182f) * r + 0.49999988f;
    const Floats part = (r * r) * tail + r + 1.0f;
    Bits bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + (127 + 64)) << 23;  // 2^64 times too large, so that it is a normal number
    Floats power;
    memcpy(&power, &bits, sizeof power);
    return part * power * 5.42101086e-20f;
}

static inline float largest(const Floats& values) {
    float most = values[0];
    for (int lane = 1; lane < kNative; lane++) most = values[lane] > most ? values[lane] : most;
    return most;
}

static inline float wide(float value) { return value; }
static inline float wide(Bfloat value) {
    const uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}
template <class T> static inline float number(const T* from, int64_t at) { return wide(from[at]); }

static inline void write(float* to, const float* from, int64_t n) { memcpy(to, from, n * sizeof(float)); }
static inline void write(Bfloat* to, const float* from, int64_t n) {
    Bfloat narrow[kBlock];
    for (int64_t i = 0; i < n; i += kNative) store(narrow + i, load(from + i));
    memcpy(to, narrow, n * sizeof(Bfloat));
}

// Calls a function of a Work, which says by `first` and `last` which of a number of things are its own, in threads.
template <class Work>
static void in_parts(const Work& work, int64_t number, int64_t threads, void* (*run)(void*)) {
    threads = threads < 1 ? 1 : threads > 256 ? 256 : threads;
    if (threads > number) threads = number;
    pthread_t others[256];
    Work parts[256];
    bool started[256] = {};
    for (int64_t i = 0; i < threads; i++) {
        parts[i] = work;
        parts[i].first = number * i / threads;
        parts[i].last = number * (i + 1) / threads;
    }
    for (int64_t i = 1; i < threads; i++) started[i] = pthread_create(&others[i], nullptr, run, &parts[i]) == 0;
    for (int64_t i = 0; i < threads; i++)
        if (!started[i]) run(&parts[i]);
    for (int64_t i = 1; i < threads; i++)
        if (started[i]) pthread_join(others[i], nullptr);
}

}  // namespace
