// One pool of threads for all kernels of this process.
//
// A job runs on every thread at once, the caller's among them. Inside a job the threads meet at barriers; each barrier
// says how many pieces of work come next, and the threads take these one by one until none is left. A thread waits by
// spinning for some microseconds, then asleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace tandem {

// Some 50 µs of pauses: longer than threads that all run wait for each other, shorter than a time slice.
constexpr int most_spins = 1000;

class Team {
   public:
    explicit Team(int size);

    // Waits for all members, then deals `num_pieces` for take(). The last to arrive does `alone` before any goes on; the
    // others call `meanwhile` until then, which should take well below a microsecond.
    template <class Alone, class Meanwhile>
    void meet(int64_t num_pieces, Alone alone, Meanwhile meanwhile) {
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (!is_last()) {
            for (int i = 0; i < most_spins; i++) {
                if (round_.load(std::memory_order_acquire) != round) return;
                meanwhile();
            }
            return sleep_while(round);
        }
        alone();
        deal(num_pieces);
        let_go();
    }
    void meet(int64_t num_pieces) {
        meet(num_pieces, [] {}, relax);
    }

    // A breath of a thread that spins.
    static void relax();

    // A piece in [0, num_pieces), each given out once; -1 when none is left. A member's own share comes first and in
    // order, so that it reads memory in order; who is done early helps the others.
    int64_t take(int member);

    int size() const { return size_; }

   private:
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    bool is_last();
    void sleep_while(uint32_t round);
    void deal(int64_t num_pieces);
    void let_go();

    const int size_;
    std::unique_ptr<Share[]> shares_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    std::atomic<int> sleepers_{0};
};

class Threads {
   public:
    using Job = std::function<void(Team&, int member)>;

    static Threads& shared();

    // Replaces the threads. With `cores`, one a thread, each is bound to its own, the caller to the first; a core may
    // be named but once. Throws std::invalid_argument when a count is below one or a core cannot be used.
    void set(int num_threads, const std::vector<int>& cores);

    int size() const { return team_->size(); }

    // Returns when every thread has ended its part. Jobs must not throw. One job at a time: others wait.
    void run(const Job& job);

    ~Threads();

   private:
    Threads();
    void work(int member, int core, uint32_t seen);  // `seen`: the jobs started before it
    void stop();

    std::mutex one_job_;
    std::unique_ptr<Team> team_;
    std::vector<std::thread> workers_;
    const Job* job_ = nullptr;
    bool ending_ = false;
    std::atomic<uint32_t> started_{0};
    std::atomic<int> sleepers_{0};
};

// Each piece once, on whichever of the shared threads.
template <class Function>
void on_all_threads(int64_t num_pieces, Function function) {
    Threads::shared().run([&](Team& team, int member) {
        team.meet(num_pieces);
        for (int64_t piece; (piece = team.take(member)) >= 0;) function(piece);
    });
}

}  // namespace tandem
