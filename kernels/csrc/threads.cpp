#include "threads.h"

#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {
namespace {

#if defined(__linux__)
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
bool bind_to(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    return sched_setaffinity(0, sizeof(set), &set) == 0;
}
#else
void sleep_while(std::atomic<uint32_t>&, uint32_t) { std::this_thread::yield(); }
void wake_all(std::atomic<uint32_t>&) {}
bool bind_to(int) { return true; }
#endif

void sleep_until_changed(std::atomic<uint32_t>& word, uint32_t value, std::atomic<int>& sleepers) {
    sleepers.fetch_add(1);
    while (word.load() == value) sleep_while(word, value);
    sleepers.fetch_sub(1);
}

void change(std::atomic<uint32_t>& word, std::atomic<int>& sleepers) {
    word.fetch_add(1);  // before the sleepers are counted: one that comes later sees the change
    if (sleepers.load() > 0) wake_all(word);
}

}  // namespace

Team::Team(int size) : size_(size), shares_(new Share[size]) {}

bool Team::is_last() {
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < size_) return false;
    arrived_.store(0, std::memory_order_relaxed);
    return true;
}

void Team::sleep_while(uint32_t round) { sleep_until_changed(round_, round, sleepers_); }

void Team::relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void Team::let_go() { change(round_, sleepers_); }

void Team::deal(int64_t num_pieces) {
    for (int i = 0; i < size_; i++) {
        shares_[i].next.store(num_pieces * i / size_, std::memory_order_relaxed);
        shares_[i].end = num_pieces * (i + 1) / size_;
    }
}

int64_t Team::take(int member) {
    for (int i = 0; i < size_; i++) {
        Share& share = shares_[(member + i) % size_];
        if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
        const int64_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
        if (piece < share.end) return piece;
    }
    return -1;
}

Threads& Threads::shared() {
    static Threads* const threads = new Threads;  // never destroyed: a worker may sleep in it while the process ends
    return *threads;
}

Threads::Threads() : team_(new Team(1)) {}

Threads::~Threads() { stop(); }

void Threads::set(int num_threads, const std::vector<int>& cores) {
    if (num_threads < 1) throw std::invalid_argument("there must be at least one thread");
    if (!cores.empty() && static_cast<int>(cores.size()) != num_threads) {
        throw std::invalid_argument(std::to_string(cores.size()) + " cores for " + std::to_string(num_threads) +
                                    " threads: expected one for each");
    }
    const std::lock_guard<std::mutex> lock(one_job_);
    stop();
    team_.reset(new Team(num_threads));
    for (size_t i = cores.size(); i-- > 0;) {  // tries them all, and stays on the first
        if (bind_to(cores[i])) continue;
        throw std::invalid_argument("core " + std::to_string(cores[i]) + " cannot be used by this process");
    }
    for (int member = 1; member < num_threads; member++) {
        workers_.emplace_back(&Threads::work, this, member, cores.empty() ? -1 : cores[member], started_.load());
    }
}

void Threads::stop() {
    if (workers_.empty()) return;
    ending_ = true;
    change(started_, sleepers_);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    ending_ = false;
}

void Threads::work(int member, int core, uint32_t seen) {
    if (core >= 0) bind_to(core);
    for (;; seen++) {
        for (int i = 0; i < most_spins && started_.load(std::memory_order_acquire) == seen; i++) Team::relax();
        sleep_until_changed(started_, seen, sleepers_);
        if (ending_) return;
        (*job_)(*team_, member);
        team_->meet(0);
    }
}

void Threads::run(const Job& job) {
    const std::lock_guard<std::mutex> lock(one_job_);
    job_ = &job;
    change(started_, sleepers_);
    job(*team_, 0);
    team_->meet(0);
}

}  // namespace tandem
