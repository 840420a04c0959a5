// The checksum of weights that are kept in a file.
//
// Memory is cut into chunks, which threads take in any order. In a chunk, eight lanes of 64 bits run
// over its words with two sums (Fletcher): the sum of the words, and the sum of these sums, which
// also depends on their order. This finds damage, not forgery, and is as fast as memory.

#pragma once

#include <cerrno>
#include <sys/mman.h>

#include <vector>

#include "vectors.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace {

typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr int64_t CHECKED_CHUNK = 4 << 20;  // bytes; whole huge pages

inline uint64_t mixed(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 32;
}

inline uint64_t chunk_checksum(const char* data, int64_t bytes) {
    u64x8 sum = {}, sums = {};
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
        sum += load<u64x8>(data + i);
        sums += sum;
    }
    if (i < bytes) {
        alignas(64) char rest[64] = {};
        std::memcpy(rest, data + i, bytes - i);
        sum += load<u64x8>(rest);
        sums += sum;
    }
    uint64_t h = mixed(0, bytes);
    for (int lane = 0; lane < 8; lane++) h = mixed(mixed(h, sum[lane]), sums[lane]);
    return h;
}

// Asks the system for pages that may be on a disk, and returns the number of the error for which
// reading them would end the process. Other errors mean that the memory cannot be asked for.
inline int ask_for_pages(const char* data, int64_t bytes) {
    if (madvise((void*)data, bytes, MADV_POPULATE_READ) == 0) return 0;
    return errno == EFAULT || errno == EHWPOISON ? errno : 0;
}

}  // namespace
