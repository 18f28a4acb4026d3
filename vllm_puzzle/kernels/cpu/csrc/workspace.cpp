#include "workspace.h"

#include <limits>

namespace puzzlemoe {
namespace {

int64_t expert_id(const PuzzleMoeCall& call, int64_t pair) {
    return call.id_type == PUZZLEMOE_INT64 ? static_cast<const int64_t*>(call.topk_ids)[pair]
                                           : static_cast<const int32_t*>(call.topk_ids)[pair];
}

// 2 * slot + member, or less than 0.
int64_t slot_code(const PuzzleMoeCall& call, int64_t pair, int members) {
    const int64_t id = expert_id(call, pair);
    return id < 0 ? -1 : int64_t(call.slot_of_expert[id]) * (2 / members);
}

}  // namespace

Workspace lay_out(const PuzzleMoeCall& call, int64_t activation_bytes) {
    Workspace space{};
    char* base = static_cast<char*>(call.workspace);
    int64_t used = 0;
    auto take = [&](int64_t bytes) {
        char* place = base ? base + used : nullptr;
        used += (bytes + 63) / 64 * 64;
        return place;
    };
    const int64_t gap = kRowGapBytes / activation_bytes;
    space.num_rows = call.num_tokens * call.top_k;
    space.x_stride = call.padded_hidden + gap;
    space.inner_stride = call.padded_intermediate + gap;
    space.row_begin = reinterpret_cast<int32_t*>(take((2 * call.num_slots + 1) * sizeof(int32_t)));
    space.groups = reinterpret_cast<Group*>(take(call.num_slots * sizeof(Group)));
    space.row_token = reinterpret_cast<int32_t*>(take(space.num_rows * sizeof(int32_t)));
    space.row_weight = reinterpret_cast<float*>(take(space.num_rows * sizeof(float)));
    space.x = take((space.num_rows + kSpareRows) * space.x_stride * activation_bytes);
    space.inner = take((space.num_rows + kSpareRows) * space.inner_stride * activation_bytes);
    const int64_t columns =
        call.padded_hidden > call.padded_intermediate ? call.padded_hidden : call.padded_intermediate;
    space.decoded_words = (columns > kLeastColumns ? columns : kLeastColumns) * kBlockRows;
    space.thread_bytes = 2 * space.decoded_words * int64_t(sizeof(uint16_t)) +
                         (call.num_tokens * kBlockRows * int64_t(sizeof(float)) + 63) / 64 * 64;
    space.per_thread = take(space.thread_bytes * call.num_threads);
    space.total_bytes = used;
    return space;
}

int64_t check(const PuzzleMoeCall& call) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
    const int64_t num_rows = call.num_tokens * call.top_k;
    if (num_rows > kMost || call.num_slots > kMost) return PUZZLEMOE_TOO_MANY_ROWS;
    const bool words = call.num_slots > 0 && call.padded_hidden > 0 && call.padded_intermediate > 0;
    const bool missing = (num_rows > 0 && (!call.topk_ids || !call.topk_weights)) ||
                         (call.num_experts > 0 && !call.slot_of_expert) ||
                         (call.num_tokens > 0 && call.hidden_size > 0 && (!call.x || !call.output)) ||
                         (words && (!call.w13 || !call.w2));
    return missing ? int64_t(PUZZLEMOE_MISSING_ADDRESS) : 0;
}

int64_t group_by_slot(const PuzzleMoeCall& call, const Workspace& space, int members) {
    const int64_t num_codes = 2 * call.num_slots;
    int32_t* begin = space.row_begin;
    for (int64_t code = 0; code <= num_codes; ++code) begin[code] = 0;
    for (int64_t pair = 0; pair < space.num_rows; ++pair) {
        if (expert_id(call, pair) >= call.num_experts) return PUZZLEMOE_UNKNOWN_EXPERT;
        const int64_t code = slot_code(call, pair, members);
        if (code >= num_codes) return PUZZLEMOE_UNKNOWN_SLOT;
        if (code >= 0) ++begin[code];
    }
    int64_t num_groups = 0;
    int32_t row = 0;
    for (int64_t slot = 0; slot < call.num_slots; ++slot) {
        Group group{int32_t(slot), row, {begin[2 * slot], begin[2 * slot + 1]}};
        begin[2 * slot] = row;
        begin[2 * slot + 1] = row + group.count[0];
        row += group.count[0] + group.count[1];
        if (group.count[0] + group.count[1]) space.groups[num_groups++] = group;
    }
    for (int64_t pair = 0; pair < space.num_rows; ++pair) {
        const int64_t code = slot_code(call, pair, members);
        if (code < 0) continue;
        const int32_t place = begin[code]++;
        space.row_token[place] = int32_t(pair / call.top_k);
        space.row_weight[place] = call.topk_weights[pair];
    }
    return num_groups;
}

}  // namespace puzzlemoe
