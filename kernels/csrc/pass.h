// One forward of a decoder: what every thread does, phase after phase, and where the phases meet.
#pragma once

#include "buffers.h"
#include "decoder.h"
#include "kernels.h"
#include "plan.h"
#include "threads.h"

namespace tandem {

// The weights that a thread will read first, asked for while it waits for the others.
class WeightsAhead {
   public:
    WeightsAhead(const char* first, const char* end) : next_(first), end_(end) {}
    void operator()();

   private:
    const char* next_;
    const char* end_;
};

class Pass {
   public:
    Pass(const DecoderModel& model, const Batch& batch, const Pool& pool, Buffers& buffers);
    void run();

   private:
    // A product is cut by panels, and by rows where their inputs would not stay in the cache.
    struct Product {
        const PackedWeight& weight;
        Input input;
        int64_t num_rows;
        Output output;

        Product prepared() const;  // once its inputs are there, by each thread
        int64_t rows_at_once() const;
        int64_t num_pieces() const;
        void run(int64_t piece) const;
        WeightsAhead ahead(int member, int num_members) const;
    };

    void work(Team& team, int member);
    void run_layer(Team& team, int member, int64_t layer);
    void run_attention(Team& team, int member, int64_t layer);
    void start_token(int64_t token);
    void normalise_then_multiply(Team& team, int member, const Vector& norm, const Product& product);
    void multiply(Team& team, int member, const Product& product);
    template <class Alone>
    void multiply(Team& team, int member, const Product& product, Alone alone);
    void normalise(const Vector& norm, int64_t token);
    void normalise_sampled();
    void prepare_all(Team& team, int member, int64_t layer);
    void prepare(int64_t layer, int64_t token, int64_t kv_head);
    void turn_head(const Vector& norm, int64_t token, float* head);
    void attend(int64_t layer, const Piece& piece, int member);
    void cap_logits(int64_t row);

    Product qkv_product(int64_t layer) const;
    Product output_product(int64_t layer) const;
    Product gate_up_product(int64_t layer) const;
    Product down_product(int64_t layer) const;
    Product head_product() const;
    HeadRows queries() const;
    HeadRows attended() const;
    float* head_of(int64_t token, int64_t head) const;  // query heads, then key heads, then value heads

    // Some tokens at a time, where one is too little work to ask for.
    int64_t num_token_groups() const;
    template <class Function>
    void each_token(Team& team, int member, Function function);

    const DecoderModel& model_;
    const DecoderShape& shape_;
    const Batch& batch_;
    const Pool& pool_;
    Buffers& buffers_;
    const Kernels& kernels_;
    const Kind kind_;  // of the products' inputs
    const AttentionPlan plan_;
};

}  // namespace tandem
