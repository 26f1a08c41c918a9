// One pool of threads for all kernels of this process.
//
// A job is a row of phases, and each phase a number of pieces that threads take one by one until none is left. Between
// two phases all pieces are done; but a phase does not wait for a thread that has taken none of them, for the machine may
// have given its core to another process just then. Such a thread finds out later which phases it missed. A thread waits
// by spinning for some microseconds, then asleep.
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

    // Leaves the last phase, and waits until its pieces are done. True: the member is in the next phase, and takes pieces
    // until there are none. False: the phase is over. Of those who wait one does `alone` and deals `num_pieces` before any
    // goes on; the others call `meanwhile`, which should take well below a microsecond.
    template <class Alone, class Meanwhile>
    bool meet(int member, int64_t num_pieces, Alone alone, Meanwhile meanwhile) {
        leave(member);
        const uint32_t phase = ++shares_[member].phase;
        for (int waits = 0;; waits++) {
            switch (arrive(member, phase)) {
                case Arrival::present: return true;
                case Arrival::late: return false;
                case Arrival::leading: alone(); open(member, num_pieces); return true;
                case Arrival::early: break;
            }
            waits < most_spins ? meanwhile() : sleep_until_open(phase);
        }
    }

    // A phase as most are: what this member gets of its pieces.
    template <class Function>
    void each(int member, int64_t num_pieces, Function function) {
        if (meet(member, num_pieces, [] {}, relax)) each_left(member, function);
    }
    template <class Function>
    void each_left(int member, Function function) {
        for (int64_t piece; (piece = take(member)) >= 0;) function(piece);
    }

    // A breath of a thread that spins.
    static void relax();

    // A piece in [0, num_pieces), each given out once; -1 when none is left. A member's own share comes first and in
    // order, so that it reads memory in order; who is done early helps the others.
    int64_t take(int member);

    int size() const { return size_; }

    // A job: begun by its owner while no member is in one, joined by each member before its first phase, left after its
    // last.
    void begin();
    void join(int member);
    void leave(int member);

   private:
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
        uint32_t phase = 0;  // that the member is in, or was in last; its own, as is the next
        bool present = false;
    };
    enum class Arrival { present, late, leading, early };

    Arrival arrive(int member, uint32_t phase);
    void sleep_until_open(uint32_t phase);
    void open(int member, int64_t num_pieces);

    const int size_;
    std::unique_ptr<Share[]> shares_;
    uint32_t first_phase_ = 0;  // before the job's own
    // The latest phase above, the members in it below; while it is dealt, `dealing` of them. Who is in a phase has seen
    // the end of its pieces when it leaves, so that a phase without members is done.
    alignas(64) std::atomic<uint64_t> gate_{0};
    alignas(64) std::atomic<uint32_t> open_{0};  // the latest phase that has been dealt
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

    // Returns when all phases are done and no thread is in the job any more. Every thread that comes in time runs it, the
    // caller surely. Jobs must not throw. One job at a time: others wait.
    void run(const Job& job);

    ~Threads();

   private:
    Threads();
    void work(int member, int core, uint32_t seen);  // `seen`: the jobs started before it
    bool enter();
    void leave();
    void close();
    void stop();

    std::mutex one_job_;
    std::unique_ptr<Team> team_;
    std::vector<std::thread> workers_;
    const Job* job_ = nullptr;
    std::atomic<bool> ending_{false};
    std::atomic<uint32_t> started_{0};
    std::atomic<uint32_t> inside_{0};  // workers in the job, and whether more may come
    std::atomic<int> sleepers_{0};
};

// Each piece once, on whichever of the shared threads.
template <class Function>
void on_all_threads(int64_t num_pieces, Function function) {
    Threads::shared().run([&](Team& team, int member) { team.each(member, num_pieces, function); });
}

}  // namespace tandem
