// Divergences and cross-entropies of rows of logits from those of a reference, and their gradients p - q, in float32
// with sums in float64. gradsurgery/losses/_divergence_kernel.py compiles and calls this; _divergence.py has the mathematics.
//
// The values take three passes over a row, of which the first reads it from memory, and the gradient takes one. A row's
// bits depend on no other row and no thread.

#include "../native/lanes.h"

namespace {

constexpr int kTotals = 6;

// What ctypes hands over.
struct Work {
    int64_t rows, vocabulary;
    const char* logits;
    int64_t logits_stride, logits_low;  // in bytes; whether they are of bfloat16
    const char* reference;              // null for the uniform distribution
    int64_t reference_stride, reference_low;
    const int64_t* labels;  // whose reference logits are lowered, -100 in rows that do not count; null for the divergence
    double beta;            // by how much
    float* values;          // to write with the totals, or null: the totals are given
    double* totals;
    const float* weights;   // of the rows' gradients
    char* gradient;         // to write, perhaps over the logits, or null; as the logits
    int64_t gradient_stride;
    int64_t first, last;  // rows of this thread
};

// The place of a reference that is the uniform distribution: its logits are 0, and their exponentials 1.
struct Flat {
    Flat operator+(int64_t) const { return Flat(); }
};

static inline Floats load(Flat) { return Floats{}; }

// Row constants, and what the label's own token has: it is taken apart, in float64.
struct Row {
    double top, reference_top;  // the largest logits
    double share, of_q;         // sum of q's exponentials over p's; that sum
    double excess, shift;       // sum of the gradient before it is taken out; log p/q - (z - r)
    double label_p, label_q, label_shifted, label_ratio;
    int64_t label;  // or -1
};

// ------------------------------------------------------------------------------------------------------------------
// Passes over a row. Each has `take`, of `n` numbers, a multiple of kLanes.
// ------------------------------------------------------------------------------------------------------------------

template <int kSums> struct Sums {
    double lanes[kSums][kLanes] = {};
    double total(int which) const {
        double sum = 0.0;
        for (int lane = 0; lane < kLanes; lane++) sum += lanes[which][lane];
        return sum;
    }
    void add(const Floats (&sums)[kSums][kParts]) {
        for (int which = 0; which < kSums; which++)
            for (int part = 0; part < kParts; part++)
                for (int lane = 0; lane < kNative; lane++)
                    lanes[which][part * kNative + lane] += sums[which][part][lane];
    }
};

template <class R> static inline Floats of_reference(R reference, Floats top) { return exponential(load(reference) - top); }
static inline Floats of_reference(Flat, Floats) { return all(1.0f); }

// z - r + shift + rest with one rounding: in a row of which one token is certain the two large numbers cancel.
template <class R> static inline Floats ratio(const Floats& z, R reference, const Floats& shift, const Floats& rest) {
    const Floats r = load(reference), apart = z - r, back = apart - z;
    const Floats error = (z - (apart - back)) - (r + back);  // of the first difference; NaN where that is infinite
    return (apart + shift) + choose(error == error, error + rest, rest);
}
static inline Floats ratio(const Floats& z, Flat, const Floats& shift, const Floats& rest) { return (z + shift) + rest; }

// The largest numbers; a NaN is passed over, and shows in the exponentials.
struct Tops {
    Floats top = all(-INFINITY), reference_top = all(-INFINITY);
    template <class Z, class R> void take(Z logits, R reference, float*, int64_t n) {
        for (int64_t i = 0; i < n; i += kNative) {
            const Floats z = load(logits + i), r = load(reference + i);
            top = choose(z > top, z, top);
            reference_top = choose(r > reference_top, r, reference_top);
        }
    }
};

// Sums of the exponentials: p's but for those that are 1, how many those are, q's, and for the cross-entropy of
// q (z - top). The ones are apart because the logarithm of 1 plus very little is wanted.
template <bool kCross> struct Exponentials : Sums<4> {
    Floats top, reference_top;
    explicit Exponentials(const Row& row) : top(all((float)row.top)), reference_top(all((float)row.reference_top)) {}
    template <class Z, class R> void take(Z logits, R reference, float*, int64_t n) {
        Floats sums[4][kParts] = {};
        for (int64_t i = 0; i < n; i += kLanes)
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++) {
                const int64_t at = i + part * kNative;
                const Floats z = load(logits + at) - top;
                const Floats p = exponential(z), q = of_reference(reference + at, reference_top);
                const Mask one = p == all(1.0f);
                sums[0][part] += kCross ? choose(one, Floats{}, p) : p;
                sums[2][part] += q;
                if (!kCross) continue;
                sums[1][part] += choose(one, all(1.0f), Floats{});
                sums[3][part] += choose(q == Floats{}, Floats{}, q * z);  // 0 times infinity is 0
            }
        add(sums);
    }
};

// One vector's p - q in the scale of q's exponentials, with q.
struct Difference {
    Floats top, reference_top, share, shift, rest;
    explicit Difference(const Row& row)
        : top(all((float)row.top)), reference_top(all((float)row.reference_top)), share(all((float)row.share)),
          shift(all((float)row.shift)), rest(all((float)(row.shift - (float)row.shift))) {}
    // Where |log p/q| < 1/2, nothing cancels: q (e^u - 1), and the divergence's term q (e^u - 1 - u).
    template <class Z, class R> inline Floats take(Z logits, R reference, Floats* q, Floats* term) const {
        const Floats z = load(logits);
        const Floats u = ratio(z, reference, shift, rest);
        const Floats p = exponential(z - top);
        *q = of_reference(reference, reference_top);
        const Floats tail =
            ((((1.98583788e-4f * u + 1.39819272e-3f) * u + 8.33350606e-3f) * u + 4.16657962e-2f) * u + 0.166666657f) * u + 0.5f;
        const Floats curve = (u * u) * tail;
        const Mask near = (u < all(0.5f)) & (u > all(-0.5f));
        const Floats far = p * share - *q;
        const Floats difference = choose(near, (u + curve) * *q, far);
        *term = choose(near, curve * *q, far - choose(*q == Floats{}, Floats{}, *q * u));
        return difference;
    }
};

// Sums of the terms of the divergence, where it is wanted, and of p - q.
template <bool kCross> struct Terms : Sums<2> {
    const Difference one;
    explicit Terms(const Row& row) : one(row) {}
    template <class Z, class R> void take(Z logits, R reference, float*, int64_t n) {
        Floats sums[2][kParts] = {};
        for (int64_t i = 0; i < n; i += kLanes)
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++) {
                const int64_t at = i + part * kNative;
                Floats q, term;
                sums[1][part] += one.take(logits + at, reference + at, &q, &term);
                if (!kCross) sums[0][part] += term;
            }
        add(sums);
    }
};

// The gradient.
struct Gradient {
    const Difference one;
    const Floats excess, scale;
    Gradient(const Row& row, double weight)
        : one(row), excess(all((float)row.excess)), scale(all((float)(weight / row.of_q))) {}
    template <class Z, class R, class To> void take(Z logits, R reference, To* to, int64_t n) {
        for (int64_t i = 0; i < n; i += kNative) {
            Floats q, term;
            const Floats difference = one.take(logits + i, reference + i, &q, &term);
            store(to + i, (difference - q * excess) * scale);
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------
// A row
// ------------------------------------------------------------------------------------------------------------------

static inline float number(Flat, int64_t) { return 0.0f; }

// Takes a pass over a row, without the label. Logits of minus infinity fill up the last block.
template <class Pass, class Z, class R, class To>
static void sweep(Pass* pass, Z logits, R reference, To* to, int64_t vocabulary, int64_t label) {
    for (int64_t start = 0; start < vocabulary; start += kBlock) {
        const int64_t n = vocabulary - start < kBlock ? vocabulary - start : kBlock;
        const bool labelled = label >= start && label < start + n;
        if (!labelled && n % kLanes == 0) {
            pass->take(logits + start, reference + start, to + start, n);
            continue;
        }
        float z[kBlock], r[kBlock], found[kBlock];
        const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = 0; i < padded; i++) {
            const bool there = i < n && start + i != label;
            z[i] = there ? number(logits, start + i) : -INFINITY;
            r[i] = there ? number(reference, start + i) : -INFINITY;
        }
        pass->take((const float*)z, (const float*)r, found, padded);
        if (to) write(to + start, found, n);
    }
}

// What the label's token adds: its exponentials as float32 has them, its log ratio, and p - q.
template <class Z, class R> static void find_label(Row* row, Z logits, R reference, double beta) {
    if (row->label < 0) return;
    row->label_shifted = (double)number(logits, row->label) - row->top;
    const double lowered = (double)number(reference, row->label) - row->reference_top - beta;
    row->label_p = (float)exp(row->label_shifted);
    row->label_q = (float)exp(lowered);
    row->label_ratio = row->label_shifted - lowered;
}

static double label_difference(const Row& row) {
    if (row.label < 0) return 0.0;
    const double u = row.label_ratio + log(row.share);
    return u < 0.5 && u > -0.5 ? row.label_q * expm1(u) : row.label_p * row.share - row.label_q;
}

// Finds the totals. Returns the value.
template <bool kCross, class Z, class R> static double measure(Row* row, Z logits, R reference, int64_t vocabulary, double beta) {
    float* const nowhere = nullptr;
    Tops tops;
    sweep(&tops, logits, reference, nowhere, vocabulary, row->label);
    row->top = largest(tops.top);
    row->reference_top = largest(tops.reference_top);
    if (row->label >= 0) {
        const float own = number(logits, row->label), other = (float)(number(reference, row->label) - beta);
        if (own > row->top) row->top = own;
        if (other > row->reference_top) row->reference_top = other;
    }
    find_label(row, logits, reference, beta);
    Exponentials<kCross> found(*row);
    sweep(&found, logits, reference, nowhere, vocabulary, row->label);
    double rest = found.total(0), ones = found.total(1), of_q = found.total(2), weighted = found.total(3);
    if (row->label >= 0) {
        (row->label_p == 1.0 ? ones : rest) += row->label_p;
        of_q += row->label_q;
        if (row->label_q != 0.0) weighted += row->label_q * row->label_shifted;
    }
    row->of_q = of_q;
    row->share = of_q / (ones + rest);
    row->shift = (row->reference_top - row->top) + log(row->share);
    Terms<kCross> terms(*row);
    sweep(&terms, logits, reference, nowhere, vocabulary, row->label);
    row->excess = (terms.total(1) + label_difference(*row)) / of_q;
    return kCross ? log(ones) + log1p(rest / ones) - weighted / of_q : terms.total(0) / of_q;
}

template <class T, class R> static void compare(const Work* work, int64_t index, T*, R reference) {
    const T* const logits = (const T*)(work->logits + index * work->logits_stride);
    T* const to = work->gradient ? (T*)(work->gradient + index * work->gradient_stride) : nullptr;
    double* const totals = work->totals + index * kTotals;
    Row row = {};
    row.label = work->labels ? work->labels[index] : -1;
    if (row.label == -100) {
        if (work->values) work->values[index] = 0.0f;
        if (to) memset(to, 0, work->vocabulary * sizeof(T));
        return;
    }
    if (work->values) {
        const auto found_value = work->labels ? measure<true, const T*, R> : measure<false, const T*, R>;
        work->values[index] = (float)found_value(&row, logits, reference, work->vocabulary, work->beta);
        const double found[kTotals] = {row.top, row.reference_top, row.share, row.of_q, row.excess, row.shift};
        memcpy(totals, found, sizeof found);
    } else {
        row.top = totals[0], row.reference_top = totals[1], row.share = totals[2];
        row.of_q = totals[3], row.excess = totals[4], row.shift = totals[5];
        find_label(&row, logits, reference, work->beta);
    }
    if (!to) return;
    const double weight = work->weights[index];
    Gradient gradient(row, weight);
    sweep(&gradient, logits, reference, to, work->vocabulary, row.label);
    if (row.label >= 0) {
        float padded[kLanes] = {};
        padded[0] = (float)((label_difference(row) - row.label_q * row.excess) * (weight / row.of_q));
        write(to + row.label, padded, 1);
    }
}

template <class T> static void compare_any(const Work* work, int64_t index, T* type) {
    const char* const reference = work->reference + index * work->reference_stride;
    if (!work->reference) compare(work, index, type, Flat());
    else if (work->reference_low) compare(work, index, type, (const Bfloat*)reference);
    else compare(work, index, type, (const float*)reference);
}

static void* run(void* argument) {
    const Work* work = (const Work*)argument;
    for (int64_t index = work->first; index < work->last; index++) {
        if (work->logits_low) compare_any(work, index, (Bfloat*)nullptr);
        else compare_any(work, index, (float*)nullptr);
    }
    return nullptr;
}

}  // namespace

extern "C" void gradsurgery_compare_rows(const Work* work, int64_t threads) { in_parts(*work, work->rows, threads, run); }
