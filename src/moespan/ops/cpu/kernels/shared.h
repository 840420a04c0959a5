// Collectives between the ranks of one machine, through memory that all of them have mapped.
//
// Memory begins with a line of 128 bytes for each rank: how many barriers the rank has reached, and
// its process. Then comes a line with the number of ranks that sleep, and two areas, which barriers
// use in turns. In an area each rank has a slot.
//
// A rank writes its slot of the next barrier's area, reaches the barrier, waits for all others, and
// reads their slots. It may do so until it reaches the barrier after that: only then can another
// rank write to the same area again. So each exchange needs one barrier.
//
// Sums are made in float32, in the order of the ranks, and rounded once: every rank gets the same
// bits, in every run.
//
// A rank that waits first spins, then lets others run, then sleeps until it is woken. Sleeping, it
// looks for the process that it waits for, and at the clock.

#pragma once

#include <cerrno>
#include <sched.h>

#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t SHARED_LINE = 128;  // two cache lines, which processors fetch together
constexpr int SPINS = 100, YIELDS = 100;  // some microseconds, and some dozens on an idle core
constexpr int64_t LOOK_NS = 500'000'000;         // between two looks of a rank that sleeps
constexpr int64_t LEAST_SPLIT_BYTES = 32 << 10;  // of a sum that more than two ranks share
constexpr int64_t PIECE_BYTES = 32 << 10;        // of a thread's work

struct SharedLine {
    std::atomic<uint32_t> reached;
    int32_t pid;
};

// One rank's end. `late` becomes the first rank that did not come; nothing is done from then on.
struct Party {
    char* memory;
    int64_t place, size, slot_bytes, timeout_ns;
    int threads;
    int late = -1;

    SharedLine& line(int64_t rank) const { return *(SharedLine*)(memory + rank * SHARED_LINE); }
    std::atomic<uint32_t>& sleepers() const { return line(size).reached; }

    // The slot of `rank` that belongs to a barrier: the next one of this rank, or the one that it
    // has just passed.
    char* slot(int64_t rank, bool is_next) const {
        const int64_t area = (line(place).reached.load(std::memory_order_relaxed) + is_next) & 1;
        return memory + (size + 1) * SHARED_LINE + (area * size + rank) * slot_bytes;
    }

    void barrier() {
        std::atomic<uint32_t>& own = line(place).reached;
        const uint32_t count = own.load(std::memory_order_relaxed) + 1;
        own.store(count);
        if (sleepers().load()) syscall(SYS_futex, &own, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
        for (int64_t rank = 0; rank < size && late < 0; rank++)
            if (rank != place && !wait_for(line(rank), count)) late = int(rank);
    }

   private:
    static bool has_reached(const SharedLine& other, uint32_t count) {
        return int32_t(other.reached.load(std::memory_order_acquire) - count) >= 0;
    }

    bool wait_for(SharedLine& other, uint32_t count) const {
        for (int i = 0; i < SPINS; i++) {
            if (has_reached(other, count)) return true;
            pause_core();
        }
        for (int i = 0; i < YIELDS; i++) {
            if (has_reached(other, count)) return true;
            sched_yield();
        }
        const int64_t deadline = now_ns() + timeout_ns;
        while (!has_reached(other, count)) {
            const uint32_t seen = other.reached.load();
            const timespec look = {0, LOOK_NS};
            sleepers().fetch_add(1);
            if (int32_t(seen - count) < 0)
                syscall(SYS_futex, &other.reached, FUTEX_WAIT, seen, &look, nullptr, 0);
            sleepers().fetch_sub(1);
            if (has_reached(other, count)) break;
            if (now_ns() > deadline || (kill(other.pid, 0) && errno == ESRCH)) return false;
        }
        return true;
    }
};

// Calls f(first, count) for parts of `bytes`, by several threads if there are several parts.
template <class F>
void in_pieces(int64_t bytes, int threads, F f) {
    const int64_t pieces = ceil_div(bytes, PIECE_BYTES);
    together(pieces > 1 ? threads : 1, [&](Team& team) {
        team.share(pieces, [&](int64_t i) {
            f(i * PIECE_BYTES, std::min(PIECE_BYTES, bytes - i * PIECE_BYTES));
        });
    });
}

inline void copy(char* to, const char* from, int64_t bytes, int threads) {
    in_pieces(bytes, threads, [&](int64_t at, int64_t count) {
        std::memcpy(to + at, from + at, count);
    });
}

inline f32x16 load_elements(const float* p) { return load<f32x16>(p); }
inline f32x16 load_elements(const bf16* p) { return load_bf16(p); }
inline void store_elements(float* p, f32x16 v) { store(p, v); }
inline void store_elements(bf16* p, f32x16 v) { store_bf16(p, v); }
inline float one_element(float x) { return x; }
inline float one_element(bf16 x) { return to_float(x); }
inline void set_element(float& to, float x) { to = x; }
inline void set_element(bf16& to, float x) { to = to_bf16(x); }

// to = the sum of the slots' bytes from `first` on, in the order of the ranks.
template <class T>
void sum_slots(const Party& party, int64_t first, int64_t bytes, char* to) {
    in_pieces(bytes, party.threads, [&](int64_t at, int64_t count) {
        const int64_t n = count / sizeof(T);
        T* out = (T*)(to + at);
        auto part = [&](int64_t rank) { return (const T*)(party.slot(rank, false) + first + at); };
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            f32x16 total = load_elements(part(0) + i);
            for (int64_t rank = 1; rank < party.size; rank++) total += load_elements(part(rank) + i);
            store_elements(out + i, total);
        }
        for (; i < n; i++) {
            float total = one_element(part(0)[i]);
            for (int64_t rank = 1; rank < party.size; rank++) total += one_element(part(rank)[i]);
            set_element(out[i], total);
        }
    });
}

// Bytes of the part of `bytes` that each rank sums: whole cache lines.
inline int64_t part_bytes(int64_t bytes, int64_t size) { return ceil_div(bytes, size * 64) * 64; }

// data = the sum of all ranks' data. Few bytes: each rank sums all. More: each rank sums a part, and
// the sums are exchanged like data.
template <class T>
void all_reduce(Party& party, char* data, int64_t bytes) {
    for (int64_t at = 0; at < bytes && party.late < 0; at += party.slot_bytes) {
        const int64_t count = std::min(party.slot_bytes, bytes - at);
        copy(party.slot(party.place, true), data + at, count, party.threads);
        party.barrier();
        if (party.late >= 0) return;
        if (party.size == 2 || count < LEAST_SPLIT_BYTES) {
            sum_slots<T>(party, 0, count, data + at);
            continue;
        }
        const int64_t part = part_bytes(count, party.size);
        auto length = [&](int64_t rank) {
            return std::max<int64_t>(0, std::min(part, count - rank * part));
        };
        const int64_t own = party.place * part;
        sum_slots<T>(party, own, length(party.place), party.slot(party.place, true) + own);
        party.barrier();
        if (party.late >= 0) return;
        for (int64_t rank = 0; rank < party.size; rank++)
            copy(data + at + rank * part, party.slot(rank, false) + rank * part, length(rank),
                 party.threads);
    }
}

// all [size, bytes] = every rank's `data`.
inline void all_gather(Party& party, const char* data, int64_t bytes, char* all) {
    copy(all + party.place * bytes, data, bytes, party.threads);
    for (int64_t at = 0; at < bytes && party.late < 0; at += party.slot_bytes) {
        const int64_t count = std::min(party.slot_bytes, bytes - at);
        copy(party.slot(party.place, true), data + at, count, party.threads);
        party.barrier();
        for (int64_t rank = 0; rank < party.size && party.late < 0; rank++)
            if (rank != party.place)
                copy(all + rank * bytes + at, party.slot(rank, false), count, party.threads);
    }
}

// part = this rank's part of the sum of all ranks' data [size, bytes].
template <class T>
void reduce_scatter(Party& party, const char* data, int64_t bytes, char* part) {
    const int64_t room = party.slot_bytes / party.size / 64 * 64;
    for (int64_t at = 0; at < bytes && party.late < 0; at += room) {
        const int64_t count = std::min(room, bytes - at);
        for (int64_t rank = 0; rank < party.size; rank++)
            copy(party.slot(party.place, true) + rank * room, data + rank * bytes + at, count,
                 party.threads);
        party.barrier();
        if (party.late < 0) sum_slots<T>(party, party.place * room, count, part + at);
    }
}

}  // namespace
