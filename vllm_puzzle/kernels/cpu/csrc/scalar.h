// Conversions and activations, written so that the compiler vectorizes them for every ISA level.
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace {

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

inline float from_bf16(uint16_t value) { return bits_as<float>(uint32_t(value) << 16); }

// To nearest even; a NaN stays one.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

inline float from_fp16(uint16_t value) {
    const uint32_t sign = uint32_t(value & 0x8000u) << 16;
    const uint32_t magnitude = value & 0x7FFFu;
    // Exponent and mantissa in float32's places stand for the number times 2^-112, subnormals included.
    const float scaled = bits_as<float>(magnitude << 13) * bits_as<float>(0x77800000u);
    const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u | (magnitude << 13) : bits_as<uint32_t>(scaled);
    return bits_as<float>(special | sign);
}

inline uint16_t to_fp16(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t result;
    if (magnitude > 0x7F800000u) {
        result = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {  // rounds to 65536 or more
        result = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves units of 2^-24 in the mantissa, rounded
        result = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        result = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return uint16_t(result | ((bits >> 16) & 0x8000u));
}

// exp(x) to 2e-7, x held to [-87, 88]: 2^n times a polynomial (Taylor, degree 7) on half a unit of log 2 either side.
inline float exp_vectorizable(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t power = (bits_as<uint32_t>(shifted) << 23) + 0x3F800000u;
    return p * bits_as<float>(power);
}

// erf(x) to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline float erf_vectorizable(float x) {
    const float z = bits_as<float>(bits_as<uint32_t>(x) & 0x7FFFFFFFu);
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float positive = 1.0f - p * t * exp_vectorizable(-z * z);
    return bits_as<float>(bits_as<uint32_t>(positive) | (bits_as<uint32_t>(x) & 0x80000000u));
}

template <PuzzleMoeActivation activation>
inline float activate(float gate) {
    if constexpr (activation == PUZZLEMOE_SILU) {
        return gate / (1.0f + exp_vectorizable(-gate));
    } else if constexpr (activation == PUZZLEMOE_GELU) {
        return 0.5f * gate * (1.0f + erf_vectorizable(gate * 0.70710678f));
    } else {
        // 0.5 * (1 + tanh(u)) is the logistic function of 2 u.
        return gate / (1.0f + exp_vectorizable(-1.59576912f * (gate + 0.044715f * gate * gate * gate)));
    }
}

}  // namespace
