/*
 * What memory is filled with, and what it is compared by: words that do not repeat and do not
 * compress. tests/tests/vm_iterative.rs computes the same.
 */
#include <stddef.h>
#include <stdint.h>

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static uint64_t hash(const uint64_t *from, size_t count)
{
	uint64_t sum = 0xcbf29ce484222325ull;

	for (size_t i = 0; i < count; i++)
		sum = (sum ^ from[i]) * 0x100000001b3ull;
	return sum;
}
