// Threads that compute a call of a kernel together.
//
// A call takes some dozens of microseconds, and so does the gap between two calls. A thread that
// sleeps takes as long to wake up. So threads wait busily for a while, but only where the cores are
// theirs. Where other programs want them, a thread that waits busily uses up the time in which it
// could have computed, and is then held up itself. So where threads have to wait for their core,
// they sleep at once in the next 500 calls, and in twice as many each time that it happens again.
// OpenMP's threads know one way of waiting for the whole program.

#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <ctime>

namespace {

constexpr int64_t BUSY_NS = 100'000;         // of waiting before a thread sleeps
constexpr int SHORT_SPINS = 64;              // about a microsecond, which is always spent busily
constexpr int CALLS_OF_A_LOOK = 64;          // between two looks at how long cores were missing
constexpr double MOST_MISSING = 0.1;         // of the time, where the cores are a team's own
constexpr int64_t LEAST_SLEEPY_CALLS = 512, MOST_SLEEPY_CALLS = 65536;
constexpr int MOST_THREADS = 1024;
constexpr int64_t TEAM_LINE = 128;           // two cache lines, which processors fetch together

inline int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
}

// Nanoseconds in which this thread could have run, and others had its core; -1 if nobody knows.
inline int64_t missing_ns() {
    char text[96] = {};
    const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    const ssize_t count = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (file >= 0) close(file);
    char* second = text;
    if (count > 0) strtoll(text, &second, 10);  // the time in which it ran
    return second == text ? -1 : strtoll(second, nullptr, 10);
}

// A number that threads wait for.
struct alignas(TEAM_LINE) Signal {
    std::atomic<uint32_t> value{0};
    std::atomic<int> sleepers{0};

    // Sets it, and wakes those that sleep.
    void set(uint32_t to) {
        value.store(to);
        wake();
    }

    void wake() {
        if (sleepers.load())
            syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }

    // The value when it is no longer `old`.
    uint32_t wait(uint32_t old, bool is_busy) {
        for (int i = 0; i < SHORT_SPINS; i++, pause_core())
            if (const uint32_t now = value.load(std::memory_order_acquire); now != old) return now;
        if (is_busy)
            for (const int64_t end = now_ns() + BUSY_NS; now_ns() < end;)
                for (int i = 0; i < SHORT_SPINS; i++, pause_core())
                    if (const uint32_t now = value.load(std::memory_order_acquire); now != old)
                        return now;
        for (;;) {
            if (const uint32_t now = value.load(std::memory_order_acquire); now != old) return now;
            sleepers.fetch_add(1);
            syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
            sleepers.fetch_sub(1);
        }
    }
};

class Team;

// The threads of this process beside those that call. There is one crew, and one call at a time.
class Crew {
  public:
    Signal call;                      // number of the call, and how many threads it has
    Signal passed;                    // number of barriers
    alignas(TEAM_LINE) std::atomic<int64_t> next{0};  // of the current loop
    alignas(TEAM_LINE) std::atomic<int> arrived{0};   // at the next barrier
    std::atomic<bool> is_busy{missing_ns() >= 0};  // whether threads wait busily

    // The crew of this process; a child after a fork has no threads, and gets one of its own.
    static Crew& here() {
        static Crew* crew = new Crew;
        if (crew->process_ != getpid()) crew = new Crew;
        return *crew;
    }

    // Runs `body(argument, team)` in up to `threads` threads. False if the crew is busy or has none:
    // nothing has run then.
    bool run(int threads, void (*body)(void*, Team&), void* argument);

    void barrier(int size) {
        const uint32_t before = passed.value.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size) {
            passed.wait(before, is_busy.load(std::memory_order_relaxed));
            return;
        }
        arrived.store(0, std::memory_order_relaxed);
        next.store(0, std::memory_order_relaxed);
        passed.set(before + 1);
    }

  private:
    const pid_t process_ = getpid();
    std::atomic<bool> is_taken_{false};
    Signal done_;                     // threads that have finished the call
    void (*body_)(void*, Team&) = nullptr;
    void* argument_ = nullptr;
    int threads_ = 0;                 // beside those that call
    alignas(TEAM_LINE) std::atomic<int64_t> missing_{0};  // most nanoseconds of a thread since `since_`
    int64_t since_ = now_ns(), calls_ = 0, sleepy_calls_ = LEAST_SLEEPY_CALLS, awake_at_ = 0;

    void start(int threads);
    void work(int thread);
    void decide();
    void look(int64_t calls);

    struct Start {
        Crew* crew;
        int thread;
    };
};

// A team as one of its threads sees it: a call of a kernel.
class Team {
  public:
    const int thread, size;

    Team(Crew* crew, int thread, int size) : thread(thread), size(size), crew_(crew) {}

    // Until all threads are here.
    void barrier() {
        if (size > 1) crew_->barrier(size);
    }

    // f(i) for i < n: each by the thread that is free first. A barrier must separate two loops.
    template <class F>
    void each(int64_t n, F f) {
        if (size == 1) {
            for (int64_t i = 0; i < n; i++) f(i);
            return;
        }
        for (int64_t i; (i = crew_->next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    }

    // f(i) for i < n: each thread takes a run of about the same length.
    template <class F>
    void share(int64_t n, F f) {
        for (int64_t i = n * thread / size; i < n * (thread + 1) / size; i++) f(i);
    }

  private:
    Crew* crew_;
};

// Every `CALLS_OF_A_LOOK` calls, tells how long this thread's core was missing meanwhile.
inline void Crew::look(int64_t calls) {
    static thread_local int64_t last = missing_ns();
    if (calls % CALLS_OF_A_LOOK) return;
    const int64_t now = missing_ns(), own = now - last;
    last = now;
    for (int64_t most = missing_.load(std::memory_order_relaxed); most < own;)
        if (missing_.compare_exchange_weak(most, own, std::memory_order_relaxed)) break;
}

// Chooses how threads wait from now on.
inline void Crew::decide() {
    look(++calls_);
    if (calls_ % CALLS_OF_A_LOOK || calls_ < awake_at_) return;
    const bool was_busy = is_busy.load(std::memory_order_relaxed);
    const int64_t now = now_ns(), missing = missing_.exchange(0, std::memory_order_relaxed);
    const bool are_ours = missing <= MOST_MISSING * (now - since_);
    since_ = now;
    if (!was_busy) {  // they have slept long enough, and try again
        is_busy.store(missing_ns() >= 0, std::memory_order_relaxed);
    } else if (are_ours) {
        sleepy_calls_ = std::max(sleepy_calls_ / 2, LEAST_SLEEPY_CALLS);
    } else {
        is_busy.store(false, std::memory_order_relaxed);
        awake_at_ = calls_ + sleepy_calls_;
        sleepy_calls_ = std::min(2 * sleepy_calls_, MOST_SLEEPY_CALLS);
    }
}

inline void Crew::work(int thread) {
    int64_t calls = 0;
    for (uint32_t seen = 0;;) {
        seen = call.wait(seen, is_busy.load(std::memory_order_relaxed));
        const int size = int(seen % MOST_THREADS);
        if (thread >= size) continue;
        Team team(this, thread, size);
        body_(argument_, team);
        look(++calls);
        if (int(done_.value.fetch_add(1)) + 2 == size) done_.wake();
    }
}

// Starts threads until there are `threads` of them, or until the system gives no more.
inline void Crew::start(int threads) {
    // Signals are for the threads of the program.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; threads_ < threads; threads_++) {
        pthread_t started;
        auto* with = new Start{this, threads_ + 1};
        const auto run = [](void* given) -> void* {
            const Start with = *(Start*)given;
            delete (Start*)given;
            with.crew->work(with.thread);
            return nullptr;
        };
        if (pthread_create(&started, nullptr, run, with)) {
            delete with;
            break;
        }
        pthread_detach(started);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

inline bool Crew::run(int threads, void (*body)(void*, Team&), void* argument) {
    if (is_taken_.exchange(true, std::memory_order_acquire)) return false;
    const int wanted = std::min(threads, MOST_THREADS - 1);
    if (threads_ < wanted - 1) start(wanted - 1);
    const int size = std::min(wanted, threads_ + 1);
    if (size > 1) {
        decide();
        body_ = body, argument_ = argument;
        next.store(0, std::memory_order_relaxed);
        done_.value.store(0, std::memory_order_relaxed);
        const uint32_t number = call.value.load(std::memory_order_relaxed) / MOST_THREADS + 1;
        call.set(number * MOST_THREADS + uint32_t(size));
        Team team(this, 0, size);
        body(argument, team);
        for (uint32_t done = done_.value.load(std::memory_order_acquire); int(done) + 1 < size;)
            done = done_.wait(done, is_busy.load(std::memory_order_relaxed));
    }
    is_taken_.store(false, std::memory_order_release);
    return size > 1;
}

// Runs body(team) in up to `threads` threads, and returns when all have ended.
template <class F>
void together(int threads, F body) {
    const auto run = [](void* given, Team& team) { (*(F*)given)(team); };
    if (threads > 1 && Crew::here().run(threads, run, &body)) return;
    Team alone(nullptr, 0, 1);
    body(alone);
}

}  // namespace
