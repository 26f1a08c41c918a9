// What a row's own tokens cost them.
#pragma once

#include <cstdint>

namespace tandem {

struct Penalties {
    float repetition;  // divides a positive logit, multiplies another; 1: none
    float presence;    // of a token that the output has
    float frequency;   // for each time that the output has it
};

// `tokens` [count] differ, and `counts` says how often each is in the output. Puts into `before` what their logits were.
void penalize(float* logits, const int64_t* tokens, const int64_t* counts, int64_t count, const Penalties&,
              float* before);

}  // namespace tandem
