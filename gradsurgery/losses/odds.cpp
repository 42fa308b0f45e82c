// Log-odds of the label, and of the likeliest other token, of rows of logits, and their gradients, in float32 with sums
// in float64. gradsurgery/losses/_odds_kernel.py compiles and calls this; _log_odds.py has the mathematics.
//
// The log-odds take one pass over a row, and the gradient takes one. A row's bits depend on no other row and no thread.

#include "../native/lanes.h"

namespace {

// What ctypes hands over. For the log-odds `gradient` is null, and what is found is written; otherwise it is given.
struct Work {
    int64_t rows, vocabulary;
    const char* logits;
    int64_t logits_stride, low;  // in bytes; whether they are of bfloat16
    double scale, cap;           // by which logits are multiplied, and where they are capped; 0: nowhere
    const int64_t* labels;  // -100 in rows that do not count: their gradient is 0
    float *largest, *rest, *label;  // the largest logit m but the label's, the sum of the other exp(z - m), the label's logit
    int64_t* runner_up;             // the place of m, the first of equals
    const float* factors;           // of exp(z - m) in the gradient
    const float *others, *shifts;   // of exp(z - m - shift), or null for none
    const float *at_label, *at_runner_up;  // the gradient there; with no others the latter is null
    char* gradient;                        // to write, perhaps over the logits; as they are
    int64_t gradient_stride;
    int64_t first, last;  // rows of this thread
};

// Logits as the model means them. `slope` is by the raw logit.
struct Raw {
    explicit Raw(const Work&) {}
    Floats operator()(const Floats& z) const { return z; }
    Floats slope(const Floats&) const { return all(1.0f); }
};

struct Scaled {
    const Floats scale;
    explicit Scaled(const Work& work) : scale(all((float)work.scale)) {}
    Floats operator()(const Floats& z) const { return z * scale; }
    Floats slope(const Floats&) const { return scale; }
};

struct Capped {
    const Floats scale, cap, twice;
    explicit Capped(const Work& work)
        : scale(all((float)work.scale)), cap(all((float)work.cap)), twice(all((float)(2.0 / work.cap))) {}
    Floats operator()(const Floats& raw) const {
        const Floats z = raw * scale, size = choose(z < Floats{}, -z, z);
        const Floats e = exponential(-size * twice);
        const Floats tanh = (1.0f - e) / (1.0f + e);
        return choose(z < Floats{}, -tanh, tanh) * cap;
    }
    Floats slope(const Floats& z) const { return scale * (1.0f - (z / cap) * (z / cap)); }
};

// The one number at a place, as the vectors have it.
template <class T, class Means> static float at(const T* logits, int64_t place, const Means& means) {
    const Floats found = means(all(number(logits, place)));
    return found[0];
}

// ------------------------------------------------------------------------------------------------------------------
// The log-odds
// ------------------------------------------------------------------------------------------------------------------

// What is known of the logits so far: the largest one, and the sum of the others' exp(z - top).
struct Found {
    float top = -INFINITY;
    double ones = 0.0, rest = 0.0;  // those that are 1 are counted apart, for the top's own 1 is no part of the sum
    int64_t block = -1;             // where the top was first seen

    // Takes `n` numbers, a multiple of kLanes and at most kBlock.
    template <class T, class Means> void take(const T* logits, int64_t n, int64_t start, const Means& means) {
        Floats z[kBlock / kNative], tops = all(-INFINITY);
        for (int64_t i = 0; i < n / kNative; i++) {
            z[i] = means(load(logits + i * kNative));
            tops = choose(z[i] > tops, z[i], tops);
        }
        const float most = ::largest(tops);
        if (most > top) {
            rest = (ones + rest) * exp((double)top - most);  // 0 before the first
            ones = 0.0, top = most, block = start;
        }
        const Floats shift = all(top == -INFINITY ? 0.0f : top);
        Floats counts[kParts] = {}, sums[kParts] = {};
        for (int64_t i = 0; i < n / kNative; i += kParts)
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++) {
                const Floats share = exponential(z[i + part] - shift);
                const Mask one = share == all(1.0f);
                counts[part] += choose(one, all(1.0f), Floats{});
                sums[part] += choose(one, Floats{}, share);
            }
        for (int part = 0; part < kParts; part++)
            for (int lane = 0; lane < kNative; lane++) ones += counts[part][lane], rest += sums[part][lane];
    }
};

template <class T, class Means> static void reduce(const Work* work, int64_t index, const T* logits, const Means& means) {
    const int64_t label = work->labels[index], vocabulary = work->vocabulary;
    if (label < 0) {
        work->largest[index] = work->rest[index] = work->label[index] = 0.0f;
        work->runner_up[index] = 0;
        return;
    }
    Found found;
    for (int64_t start = 0; start < vocabulary; start += kBlock) {
        const int64_t n = vocabulary - start < kBlock ? vocabulary - start : kBlock;
        const bool labelled = label >= start && label < start + n;
        if (!labelled && n % kLanes == 0) {
            found.take(logits + start, n, start, means);
            continue;
        }
        // Without the label, and filled up to whole lanes: by minus infinity after the cap, which would make a number of it.
        float z[kBlock] = {};
        const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = 0; i < n; i++) z[i] = number(logits, start + i);
        for (int64_t i = 0; i < padded; i += kNative) store(z + i, means(load(z + i)));
        for (int64_t i = n; i < padded; i++) z[i] = -INFINITY;
        if (labelled) z[label - start] = -INFINITY;
        found.take((const float*)z, padded, start, Raw(*work));
    }
    int64_t place = found.block < 0 ? vocabulary : found.block;
    while (place < vocabulary && (place == label || at(logits, place, means) != found.top)) place++;
    if (place == vocabulary) place = label == 0;  // all others are minus infinity
    work->largest[index] = found.top;
    work->rest[index] = (float)(found.rest + (found.block < 0 ? 0.0 : found.ones - 1.0));
    work->label[index] = at(logits, label, means);
    work->runner_up[index] = place;
}

// ------------------------------------------------------------------------------------------------------------------
// The gradient
// ------------------------------------------------------------------------------------------------------------------

template <class T, class Means> static void differentiate(const Work* work, int64_t index, const T* logits, const Means& means) {
    T* const to = (T*)(work->gradient + index * work->gradient_stride);
    const int64_t vocabulary = work->vocabulary, label = work->labels[index], second = work->runner_up[index];
    if (label < 0) {
        memset(to, 0, vocabulary * sizeof(T));
        return;
    }
    const float slopes[2] = {means.slope(all(at(logits, label, means)))[0], means.slope(all(at(logits, second, means)))[0]};
    const Floats top = all(work->largest[index]);
    double factor = work->factors[index];
    Floats other = Floats{}, shift = Floats{};
    // One exponential does for both, but where the runner-up is so certain that the others' underflow.
    const bool apart = work->others && work->shifts[index] < -40.0f;
    if (apart) other = all(work->others[index]), shift = all(work->shifts[index]);
    else if (work->others) factor += work->others[index] * exp(-(double)work->shifts[index]);
    const Floats one = all((float)factor);
    const auto row = [&](const Floats& z) {
        const Floats away = z - top;
        const Floats near = exponential(away);
        Floats found = near * one;
        // What is 0 here is no part of the shift's sum either, and may be far above it. The runner-up's own is overwritten.
        if (apart) found += choose(near == Floats{}, Floats{}, exponential(away - shift)) * other;
        return found * means.slope(z);
    };
    const int64_t whole = vocabulary / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kNative) store(to + i, row(means(load(logits + i))));
    if (whole < vocabulary) {
        float last[kLanes] = {};
        for (int64_t i = whole; i < vocabulary; i++) last[i - whole] = row(all(at(logits, i, means)))[0];
        write(to + whole, last, vocabulary - whole);
    }
    float padded[kLanes] = {};
    if (work->at_runner_up) {
        padded[0] = work->at_runner_up[index] * slopes[1];
        write(to + second, padded, 1);
    }
    padded[0] = work->at_label[index] * slopes[0];
    write(to + label, padded, 1);
}

// ------------------------------------------------------------------------------------------------------------------

template <class T, class Means> static void rows(const Work* work, T*) {
    const Means means(*work);
    for (int64_t index = work->first; index < work->last; index++) {
        const T* const logits = (const T*)(work->logits + index * work->logits_stride);
        if (work->gradient) differentiate(work, index, logits, means);
        else reduce(work, index, logits, means);
    }
}

template <class T> static void rows_of(const Work* work, T* type) {
    if (work->cap != 0.0) rows<T, Capped>(work, type);
    else if (work->scale != 1.0) rows<T, Scaled>(work, type);
    else rows<T, Raw>(work, type);
}

static void* run(void* argument) {
    const Work* work = (const Work*)argument;
    if (work->low) rows_of(work, (Bfloat*)nullptr);
    else rows_of(work, (float*)nullptr);
    return nullptr;
}

}  // namespace

extern "C" void gradsurgery_log_odds(const Work* work, int64_t threads) { in_parts(*work, work->rows, threads, run); }
