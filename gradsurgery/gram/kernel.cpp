// Products and combinations of rows in one pass over memory. gradsurgery/gram/kernel.py compiles and calls this.
//
// An address with its lowest bit set is of bfloat16 numbers, any other of float32; 0 is a missing gradient.
// Sums are taken in 16 lanes whatever the processor's registers are, and in the same order with any number of threads.

#include "../native/lanes.h"

#include <stdlib.h>

namespace {

constexpr int64_t kChunk = 1 << 16;    // what a thread takes at a time, a multiple of kBlock
constexpr int64_t kMostRows = 16;

// Twice as many bfloat16 numbers, as two vectors: those of even and those of odd places. It takes fewer instructions
// than spreading them in their order, and sums do not mind.
struct Pair {
    Floats even, odd;
};

static inline Pair load_pair(const Bfloat* from) {
    Bits bits;
    memcpy(&bits, from, sizeof bits);
    const Bits even = bits << 16, odd = bits & 0xffff0000;
    Pair pair;
    memcpy(&pair.even, &even, sizeof even);
    memcpy(&pair.odd, &odd, sizeof odd);
    return pair;
}

static inline void store_pair(Bfloat* to, const Pair& pair) {
    const Bits bits = (rounded(pair.even) >> 16) | (rounded(pair.odd) & 0xffff0000);
    memcpy(to, &bits, sizeof bits);
}

// Applies a function of addresses to all numbers, the last few through padded copies.
template <int kStep = kNative, class To, class From, class Each>
static inline void each(To* to, const From* from, int64_t n, Each function) {
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) function(to + i, from + i);
    if (i < n) {
        To last[kStep] = {};
        From others[kStep] = {};
        memcpy(last, to + i, (n - i) * sizeof(To));
        memcpy(others, from + i, (n - i) * sizeof(From));
        function(last, others);
        memcpy(to + i, last, (n - i) * sizeof(To));
    }
}

template <class To, class From> static void convert(To* to, const From* from, int64_t n) {
    each(to, from, n, [](To* a, const From* b) { store(a, load(b)); });
}

static void multiply_by(float* to, float scale, int64_t n) {
    each(to, to, n, [=](float* a, const float*) { store(a, load(a) * scale); });
}

template <class From> static void add(float* to, const From* other, float coefficient, int64_t n) {
    each(to, other, n, [=](float* a, const From* b) { store(a, load(a) + load(b) * coefficient); });
}

// Keeps a compiler from making one rounding of a product that is added to another: PyTorch rounds both.
static inline void round_here(Floats& values) {
#if defined(__x86_64__)
    asm("" : "+x"(values));
#elif defined(__aarch64__)
    asm("" : "+w"(values));
#else
    asm("" : "+m"(values));
#endif
}

// Two rows of bfloat16 are not widened in memory.
static void combine_pairs(Bfloat* to, float scale, const Bfloat* other, float coefficient, int64_t n) {
    const bool scales = scale != 1.0f;
    each<2 * kNative>(to, other, n, [=](Bfloat* a, const Bfloat* b) {
        Pair sum = load_pair(a);
        const Pair from = load_pair(b);
        if (scales) {
            sum.even *= scale;
            sum.odd *= scale;
            round_here(sum.even);
            round_here(sum.odd);
        }
        sum.even += from.even * coefficient;
        sum.odd += from.odd * coefficient;
        store_pair(a, sum);
    });
}

static inline bool low(int64_t address) { return address & 1; }
static inline const float* floats(int64_t address, int64_t start = 0) { return (const float*)address + start; }
static inline Bfloat* bfloats(int64_t address, int64_t start = 0) { return (Bfloat*)(address & ~(int64_t)1) + start; }
static inline int64_t at(int64_t address, int64_t start) {
    return address ? address + start * (int64_t)(low(address) ? sizeof(Bfloat) : sizeof(float)) : 0;
}

// What one step of a sum takes from a row: vectors of 16 lanes, one of float32 or two of bfloat16 numbers.
static inline void take(const float* from, int part, Floats* x) { x[0] = load(from + part * kNative); }
static inline void take(const Bfloat* from, int part, Floats* x) {
    const Pair pair = load_pair(from + 2 * part * kNative);
    x[0] = pair.even;
    x[1] = pair.odd;
}

// Adds the 16 lanes of each sum of products x_a * x_b, a <= b, over at most kBlock numbers.
template <int K, class T> static void dots(const T* const* rows, int64_t n, double (*sums)[kLanes]) {
    constexpr int kPairs = K * (K + 1) / 2, kVectors = sizeof(float) / sizeof(T), kStep = kLanes * kVectors;
    Floats lanes[kPairs][kParts][kVectors] = {};
    T last[K][kStep] = {};
    const T* at[K];
    for (int k = 0; k < K; k++) at[k] = rows[k];
    for (int64_t i = 0; i < n;) {
        const bool whole = i + kStep <= n;
        if (!whole)
            for (int k = 0; k < K; k++) {
                memcpy(last[k], at[k] + i, (n - i) * sizeof(T));
                at[k] = last[k] - i;
            }
        const int64_t end = whole ? n - (n - i) % kStep : i + kStep;
        for (; i < end; i += kStep) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++) {
                Floats x[K][kVectors];
#pragma GCC unroll 4
                for (int k = 0; k < K; k++) take(at[k] + i, part, x[k]);
                int pair = 0;
#pragma GCC unroll 4
                for (int a = 0; a < K; a++)
#pragma GCC unroll 4
                    for (int b = a; b < K; b++, pair++)
#pragma GCC unroll 2
                        for (int v = 0; v < kVectors; v++) lanes[pair][part][v] += x[a][v] * x[b][v];
            }
        }
    }
    for (int pair = 0; pair < kPairs; pair++)
        for (int part = 0; part < kParts; part++)
            for (int v = 0; v < kVectors; v++)
                for (int lane = 0; lane < kNative; lane++)
                    sums[pair][part * kNative + lane] += lanes[pair][part][v][lane];
}

// As above for any number of rows.
template <class T> static void all_dots(const T* const* rows, int64_t m, int64_t n, double (*sums)[kLanes]) {
    if (m == 1) return dots<1>(rows, n, sums);
    if (m == 2) return dots<2>(rows, n, sums);
    if (m == 3) return dots<3>(rows, n, sums);
    // Both squares of a pair are taken again with each product; what is in the cache costs little.
    for (int64_t a = 0, pair = 0; a < m; a++)
        for (int64_t b = a; b < m; b++, pair++) {
            double three[3][kLanes] = {};
            const T* const two[2] = {rows[a], rows[b]};
            dots<2>(two, n, three);
            for (int lane = 0; lane < kLanes; lane++) sums[pair][lane] += three[1][lane];
        }
}

// to <- lerp(to, other, weight), rounded as PyTorch's, or other - to where the weight is NaN.
template <class To, class From> static void overwrite(To* to, const From* other, double weight, int64_t n) {
    if (weight != weight)
        return each(to, other, n, [](To* a, const From* b) { store(a, load(b) - load(a)); });
    const float share = (float)weight;
    const bool near = share < 0.5f && share > -0.5f;
    const float factor = near ? share : share - 1.0f;
    each(to, other, n, [=](To* a, const From* b) {
        const Floats x = load(a), y = load(b);
        store(a, (near ? x : y) + (y - x) * factor);
    });
}

struct Work {
    int64_t rows, tensors;
    const int64_t *addresses, *sizes, *blocks;
    const double* coefficients;  // to combine by; null where products are asked for
    int64_t writes;              // rows to overwrite before they are multiplied, whose other tensors follow the rows'
    const int64_t* written;      // their numbers; ~number of a row that is multiplied as if it were overwritten, and is not
    const double* weights;
    double* partial;             // of each chunk and pair of rows
    int64_t first, last;         // chunks of this thread
};

static int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

static void multiply_chunk(const Work* work, const int64_t* address, int64_t begin, int64_t end, double* partial) {
    float wide[kMostRows][kBlock], spare[kMostRows][kBlock];
    double sums[kMostRows * (kMostRows + 1) / 2][kLanes];
    int64_t present[kMostRows], m = 0;
    for (int64_t k = 0; k < work->rows; k++)
        if (address[k]) present[m++] = k;
    memset(sums, 0, sizeof(sums[0]) * (m * (m + 1) / 2));
    bool all_low = true;
    for (int64_t a = 0; a < m; a++) all_low = all_low && low(address[present[a]]);
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t n = end - start < kBlock ? end - start : kBlock;
        int64_t here[kMostRows];  // where this block of each row is
        for (int64_t k = 0; k < work->rows; k++) here[k] = at(address[k], start);
        for (int64_t w = 0; w < work->writes; w++) {
            const bool stored = work->written[w] >= 0;
            const int64_t k = stored ? work->written[w] : ~work->written[w], other = at(address[work->rows + w], start);
            if (!here[k] || !other) continue;
            if (!stored) {
                memcpy(spare[k], bfloats(here[k]), n * (low(here[k]) ? sizeof(Bfloat) : sizeof(float)));
                here[k] = (int64_t)spare[k] | low(here[k]);
            }
            const int64_t to = here[k];
            const double weight = work->weights[w];
            if (low(to) && low(other)) overwrite(bfloats(to), bfloats(other), weight, n);
            else if (low(to)) overwrite(bfloats(to), floats(other), weight, n);
            else if (low(other)) overwrite((float*)floats(to), bfloats(other), weight, n);
            else overwrite((float*)floats(to), floats(other), weight, n);
        }
        const Bfloat* narrow[kMostRows];
        const float* rows[kMostRows];
        for (int64_t a = 0; a < m; a++) {
            const int64_t from = here[present[a]];
            narrow[a] = bfloats(from);
            rows[a] = low(from) ? wide[a] : floats(from);
            if (low(from) && !all_low) convert(wide[a], narrow[a], n);
        }
        if (all_low) all_dots(narrow, m, n, sums);
        else all_dots(rows, m, n, sums);
    }
    int64_t pair = 0;
    for (int64_t a = 0; a < m; a++)
        for (int64_t b = a; b < m; b++, pair++) {
            double sum = 0.0;
            for (int lane = 0; lane < kLanes; lane++) sum += sums[pair][lane];
            partial[present[a] * work->rows + present[b]] = sum;
        }
}

static void combine_chunk(const Work* work, const int64_t* address, const double* coefficients, int64_t begin, int64_t end) {
    float wide[kBlock];
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t n = end - start < kBlock ? end - start : kBlock;
        const bool narrow = low(address[0]);
        if (work->rows == 2 && narrow && low(address[1])) {
            combine_pairs(
                bfloats(address[0], start), (float)coefficients[0], bfloats(address[1], start), (float)coefficients[1], n
            );
            continue;
        }
        float* to = narrow ? wide : (float*)floats(address[0], start);
        if (narrow) convert(wide, bfloats(address[0], start), n);
        // Scaled and rounded before anything is added, as PyTorch does; the block stays in the first cache.
        if (coefficients[0] != 1.0) multiply_by(to, (float)coefficients[0], n);
        for (int64_t k = 1; k < work->rows; k++) {
            const int64_t from = address[k];
            if (!from) continue;
            if (low(from)) add(to, bfloats(from, start), (float)coefficients[k], n);
            else add(to, floats(from, start), (float)coefficients[k], n);
        }
        if (narrow) convert(bfloats(address[0], start), wide, n);
    }
}

static void* run(void* argument) {
    const Work* work = (const Work*)argument;
    int64_t chunk = 0;
    for (int64_t t = 0; t < work->tensors && chunk < work->last; t++) {
        const int64_t size = work->sizes[t], number = chunks_of(size);
        const int64_t* address = work->addresses + t * (work->rows + work->writes);
        for (int64_t c = work->first > chunk ? work->first - chunk : 0; c < number && chunk + c < work->last; c++) {
            const int64_t begin = c * kChunk, end = begin + kChunk < size ? begin + kChunk : size;
            if (work->coefficients)
                combine_chunk(work, address, work->coefficients + work->blocks[t] * work->rows, begin, end);
            else
                multiply_chunk(work, address, begin, end, work->partial + (chunk + c) * work->rows * work->rows);
        }
        chunk += number;
    }
    return nullptr;
}

static int64_t all_chunks(int64_t tensors, const int64_t* sizes) {
    int64_t chunks = 0;
    for (int64_t t = 0; t < tensors; t++) chunks += chunks_of(sizes[t]);
    return chunks;
}

}  // namespace

// Does the writes, and adds the products of `rows` rows over `tensors` tensors to total[block][row][row]. Returns 0, or 1 without memory.
extern "C" int32_t gradsurgery_products(
    int64_t rows, int64_t tensors, const int64_t* addresses, const int64_t* sizes, const int64_t* blocks, double* total,
    int64_t threads, int64_t writes, const int64_t* written, const double* weights
) {
    const int64_t chunks = all_chunks(tensors, sizes);
    double* partial = (double*)calloc(chunks * rows * rows + 1, sizeof(double));
    if (!partial) return 1;
    in_parts(Work{rows, tensors, addresses, sizes, blocks, nullptr, writes, written, weights, partial, 0, 0}, chunks, threads, run);
    const double* from = partial;
    for (int64_t t = 0; t < tensors; t++) {
        double* to = total + blocks[t] * rows * rows;
        for (int64_t a = 0; a < rows; a++)
            for (int64_t b = a; b < rows; b++) {
                double sum = 0.0;
                for (int64_t c = 0; c < chunks_of(sizes[t]); c++) sum += from[(c * rows + a) * rows + b];
                to[a * rows + b] += sum;
                if (a != b) to[b * rows + a] += sum;
            }
        from += chunks_of(sizes[t]) * rows * rows;
    }
    free(partial);
    return 0;
}

// Overwrites the first row by the sum of coefficients[block][row] * row.
extern "C" int32_t gradsurgery_combine(
    int64_t rows, int64_t tensors, const int64_t* addresses, const int64_t* sizes, const int64_t* blocks,
    const double* coefficients, int64_t threads, int64_t, const int64_t*, const double*
) {
    const Work work{rows, tensors, addresses, sizes, blocks, coefficients, 0, nullptr, nullptr, nullptr, 0, 0};
    in_parts(work, all_chunks(tensors, sizes), threads, run);
    return 0;
}
