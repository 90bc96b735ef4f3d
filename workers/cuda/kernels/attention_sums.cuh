// Sums of attention_decode that lie in parts, each with its own maximum, added in the list's order.
#pragma once

#include "attention.cuh"

namespace {

constexpr int kAtOnce = 8; // partial sums read at once

// A head that goes on in other CTAs.
struct Cut {
    int parts, first, first_slot, counter;
};

DEVICE void add_scaled(float4& acc, float weight, float4 x) {
    acc.x += weight * x.x;
    acc.y += weight * x.y;
    acc.z += weight * x.z;
    acc.w += weight * x.w;
}
DEVICE void store_scaled(bf16* to, float scale, float4 x) {
    *(uint2*)to = make_uint2(pack_bf16(x.x * scale, x.y * scale), pack_bf16(x.z * scale, x.w * scale));
}

// Adds up a head whose parts lie in `partial`, [slot][head][HEAD_DIM], with {maximum, sum of weights} in `totals`. All threads of the CTA.
template <int THREADS> DEVICE void add_parts(const Cut& shared_cut, const float* partial, const float2* totals, bf16* out) {
    const Cut cut = shared_cut;
    for (int i = threadIdx.x; i < kGroup * kDim / 4; i += THREADS) {
        int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
        float top = -INFINITY, sum = 0;
        float4 acc = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int base = 0; base < cut.parts; base += kAtOnce) {
            float4 x[kAtOnce];
            float2 total[kAtOnce];
            float above = top;
#pragma unroll
            for (int j = 0; j < kAtOnce; j++) {
                int p = base + j, from = p == 0 ? cut.first_slot : 2 * (cut.first + p);
                total[j] = make_float2(-INFINITY, 0);
                x[j] = make_float4(0, 0, 0, 0);
                if (p < cut.parts) {
                    total[j] = __ldcg(totals + from * kGroup + head);
                    x[j] = __ldcg((const float4*)(partial + ((long long)from * kGroup + head) * kDim + d));
                }
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; j++) above = fmaxf(above, total[j].x);
            float weight = exp2_approx(top - above);
            top = above;
            sum *= weight;
            acc = make_float4(acc.x * weight, acc.y * weight, acc.z * weight, acc.w * weight);
#pragma unroll
            for (int j = 0; j < kAtOnce; j++) {
                weight = exp2_approx(total[j].x - top);
                sum += weight * total[j].y;
                add_scaled(acc, weight, x[j]);
            }
        }
        store_scaled(out + ((long long)cut.counter * kGroup + head) * kDim + d, 1.0f / sum, acc);
    }
}

} // namespace
