// The slots of a layer whose keys are scaled by channel: see ChannelRows in slot_views.py.

#pragma once

#include "formats.h"

namespace {

// Slots by head; those of a slot one after another.
struct ChannelRows {
    ChannelKeys keys;                               // of all slots
    Stored values;                                  // of all slots
    bf16 *exact_keys, *exact_values;                // [heads][KEY_GROUP][dim]
    int32_t* exact_rows;                            // [heads][KEY_GROUP]
    const int64_t *first, *first_group, *capacity;  // [heads]: first value, first group of keys, rows

    // One head alone.
    ChannelRows of(long head) const {
        return {keys.from(first_group[head]),
                values.from(first[head]),
                exact_keys + head * KEY_GROUP * keys.dim,
                exact_values + head * KEY_GROUP * values.dim,
                exact_rows + head * KEY_GROUP,
                first + head,
                first_group + head,
                capacity + head};
    }
    const bf16* exact_key(long position) const { return exact_keys + position % KEY_GROUP * keys.dim; }
    const bf16* exact_value(long position) const { return exact_values + position % KEY_GROUP * values.dim; }
    // The following are of one head.
    void put_exact(long position, const bf16* key, const bf16* value) const {
        const long entry = position % KEY_GROUP;
        std::memcpy(exact_keys + entry * keys.dim, key, keys.dim * sizeof(bf16));
        std::memcpy(exact_values + entry * values.dim, value, values.dim * sizeof(bf16));
        exact_rows[entry] = static_cast<int32_t>(position);
    }
    // Stores a token's pair; if its key is the last of a group, the group's.
    void put(long position, const bf16* key, const bf16* value) const {
        put_exact(position, key, value);
        values.put(position, value);
        if (position % KEY_GROUP != KEY_GROUP - 1) return;
        const bf16* vectors[KEY_GROUP];
        for (long i = 0; i < KEY_GROUP; i++) vectors[i] = exact_key(i);
        keys.put(position / KEY_GROUP, vectors);
    }
};

}  // namespace
