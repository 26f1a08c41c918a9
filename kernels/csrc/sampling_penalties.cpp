#include "sampling_penalties.h"

namespace tandem {

void penalize(float* logits, const int64_t* tokens, const int64_t* counts, int64_t count, const Penalties& penalties,
              float* before) {
    for (int64_t i = 0; i < count; i++) {
        float& logit = logits[tokens[i]];
        before[i] = logit;
        const double repeated = logit > 0 ? logit / penalties.repetition : logit * penalties.repetition;
        const double frequency = static_cast<double>(penalties.frequency) * static_cast<double>(counts[i]);
        logit = static_cast<float>(repeated - frequency - (counts[i] > 0 ? penalties.presence : 0.0f));
    }
}

}  // namespace tandem
