#include "workspace.h"

namespace puzzlemoe {
namespace {

int64_t expert_id(const PuzzleMoeCall& call, int64_t pair) {
    return call.ids_are_int64 ? static_cast<const int64_t*>(call.topk_ids)[pair]
                              : static_cast<const int32_t*>(call.topk_ids)[pair];
}

int32_t slot_code(const PuzzleMoeCall& call, int64_t pair) {
    const int64_t id = expert_id(call, pair);
    return id < 0 ? -1 : call.slot_of_expert[id];
}

}  // namespace

int64_t group_by_slot(const PuzzleMoeCall& call, const Workspace& space) {
    const int64_t num_codes = 2 * call.num_slots;
    int32_t* begin = space.row_begin;
    for (int64_t code = 0; code <= num_codes; ++code) begin[code] = 0;
    for (int64_t pair = 0; pair < space.num_rows; ++pair) {
        if (expert_id(call, pair) >= call.num_experts) return -1;
        const int32_t code = slot_code(call, pair);
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
        const int32_t code = slot_code(call, pair);
        if (code < 0) continue;
        const int32_t place = begin[code]++;
        space.row_token[place] = int32_t(pair / call.top_k);
        space.row_weight[place] = call.topk_weights[pair];
    }
    return num_groups;
}

}  // namespace puzzlemoe
