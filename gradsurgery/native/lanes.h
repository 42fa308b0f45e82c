// What the kernels share: vectors of float32 numbers, read and written as float32 or bfloat16, and threads.
//
// Sums are taken in 16 lanes whatever the processor's registers are.

#pragma once

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

typedef float Floats __attribute__((vector_size(4 * kNative)));
typedef uint32_t Bits __attribute__((vector_size(4 * kNative)));
typedef uint16_t Halves __attribute__((vector_size(2 * kNative)));
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
