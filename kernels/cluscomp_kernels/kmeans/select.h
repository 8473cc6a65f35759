/* Selecting and sorting candidates by distance, then id. */
#ifndef CLUSCOMP_KMEANS_SELECT_H
#define CLUSCOMP_KMEANS_SELECT_H

#include "kmeans/tiles.h"

/* Keys have the order of (distance, id), since neither is negative. */
static CC_INLINE uint64_t cc_key(float distance, int32_t id)
{
    return (uint64_t)(uint32_t)cc_bits(distance) << 32 | (uint32_t)id;
}

static CC_INLINE float cc_key_distance(uint64_t key)
{
    return cc_float((int32_t)(key >> 32));
}

static CC_INLINE int32_t cc_key_id(uint64_t key)
{
    return (int32_t)(uint32_t)key;
}

static CC_INLINE void cc_insertion_sort(uint64_t *keys, int64_t count)
{
    for (int64_t i = 1; i < count; i++) {
        uint64_t key = keys[i];
        int64_t j = i;
        for (; j > 0 && keys[j - 1] > key; j--)
            keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

/* Hoare's partition around the median of three; both sides [0, split) and [split, count) are not empty. */
static CC_INLINE int64_t cc_divide(uint64_t *keys, int64_t count)
{
    uint64_t a = keys[0], b = keys[count / 2], c = keys[count - 1];
    uint64_t pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
    int64_t left = 0, right = count - 1;
    for (;;) {
        while (keys[left] < pivot)
            left++;
        while (keys[right] > pivot)
            right--;
        if (left >= right)
            return left > 0 ? left : 1;
        uint64_t key = keys[left];
        keys[left++] = keys[right];
        keys[right--] = key;
    }
}

/* Moves the `length` smallest keys to the front, and the largest of them to keys[length - 1]; 0 < length < count. */
static inline void cc_select(uint64_t *keys, int64_t count, int64_t length)
{
    int64_t begin = 0, end = count;
    while (end - begin > 16) {
        int64_t split = begin + cc_divide(keys + begin, end - begin);
        if (split >= length)
            end = split;
        else
            begin = split;
    }
    cc_insertion_sort(keys + begin, end - begin);
}

static inline void cc_sort(uint64_t *keys, int64_t count)
{
    while (count > 24) {
        int64_t split = cc_divide(keys, count);
        if (split < count - split) {
            cc_sort(keys, split);
            keys += split;
            count -= split;
        } else {
            cc_sort(keys + split, count - split);
            count = split;
        }
    }
    cc_insertion_sort(keys, count);
}

#endif
