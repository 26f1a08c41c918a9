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

constexpr uint32_t dealing = UINT32_MAX;

uint64_t gate_of(uint32_t phase, uint32_t members) { return static_cast<uint64_t>(phase) << 32 | members; }
uint32_t phase_of(uint64_t gate) { return static_cast<uint32_t>(gate >> 32); }
uint32_t members_of(uint64_t gate) { return static_cast<uint32_t>(gate); }

constexpr uint32_t more_may_come = 1u << 31;

}  // namespace

Team::Team(int size) : size_(size), shares_(new Share[size]) {}

void Team::begin() { first_phase_ = phase_of(gate_.load()); }

void Team::join(int member) { shares_[member].phase = first_phase_; }

void Team::leave(int member) {
    if (!shares_[member].present) return;
    shares_[member].present = false;
    gate_.fetch_sub(1, std::memory_order_acq_rel);
}

Team::Arrival Team::arrive(int member, uint32_t phase) {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    for (;;) {
        const bool is_open = phase_of(gate) == phase;
        if (!is_open && phase_of(gate) != phase - 1) return Arrival::late;
        if (is_open ? members_of(gate) == dealing : members_of(gate) > 0) return Arrival::early;
        const uint64_t after = is_open ? gate + 1 : gate_of(phase, dealing);
        if (!gate_.compare_exchange_weak(gate, after, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        shares_[member].present = true;
        return is_open ? Arrival::present : Arrival::leading;
    }
}

void Team::open(int member, int64_t num_pieces) {
    for (int i = 0; i < size_; i++) {
        shares_[i].next.store(num_pieces * i / size_, std::memory_order_relaxed);
        shares_[i].end = num_pieces * (i + 1) / size_;
    }
    gate_.store(gate_of(shares_[member].phase, 1), std::memory_order_release);
    change(open_, sleepers_);
}

void Team::sleep_until_open(uint32_t phase) { sleep_until_changed(open_, phase - 1, sleepers_); }

void Team::relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
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
    for (;;) {
        for (int i = 0; i < most_spins && started_.load(std::memory_order_acquire) == seen; i++) Team::relax();
        sleep_until_changed(started_, seen, sleepers_);
        seen = started_.load();
        if (ending_) return;
        if (!enter()) continue;
        team_->join(member);
        (*job_)(*team_, member);
        team_->leave(member);
        leave();
    }
}

// False when the job has ended without this thread.
bool Threads::enter() {
    uint32_t inside = inside_.load(std::memory_order_acquire);
    while ((inside & more_may_come) != 0) {
        if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
}

void Threads::leave() {
    inside_.fetch_sub(1);  // before the sleepers are counted, as in `change`
    if (sleepers_.load() > 0) wake_all(inside_);
}

void Threads::close() {
    uint32_t inside = inside_.fetch_and(~more_may_come) & ~more_may_come;
    for (int i = 0; i < most_spins && inside != 0; i++) {
        Team::relax();
        inside = inside_.load(std::memory_order_acquire);
    }
    for (; inside != 0; inside = inside_.load()) sleep_until_changed(inside_, inside, sleepers_);
}

void Threads::run(const Job& job) {
    const std::lock_guard<std::mutex> lock(one_job_);
    job_ = &job;
    team_->begin();
    inside_.store(more_may_come);
    change(started_, sleepers_);
    team_->join(0);
    job(*team_, 0);
    team_->leave(0);
    close();
}

}  // namespace tandem
