/*
 * writer LOG MIB STRIDE: memory of which every STRIDE-th page is written again and again.
 *
 * The share of pages that a round of a migration finds dirty is so known: all of these pages, once
 * CYCLE_TICKS ticks have passed. The memory is a function of the number of writes alone, so that
 * the test can compute its hash by itself; a page of an earlier round in place of a later one
 * changes it.
 */
#include "report.h"
#include "content.h"
#include <sys/mman.h>

#define PAGE_WORDS (4096 / sizeof(uint64_t))
#define CYCLE_TICKS 16

int main(int argc, char **argv)
{
	size_t words, stride, hot;
	uint64_t *memory, writes = 0;

	if (argc != 4)
		return 64;
	open_log(argv[1]);
	block_requests();
	words = (size_t)atoi(argv[2]) * (1 << 20) / sizeof(*memory);
	stride = atoi(argv[3]);
	if (words == 0 || stride == 0)
		return 64;
	hot = (words / PAGE_WORDS + stride - 1) / stride;
	memory = mmap(NULL, words * sizeof(*memory), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	/* Pages of a known size, whatever the machine's policy on large ones is. */
	if (madvise(memory, words * sizeof(*memory), MADV_NOHUGEPAGE))
		die("madvise");
	for (size_t i = 0; i < words; i++)
		memory[i] = mix(i + 1);
	say("ready hot=%zu", hot);
	for (;;) {
		tick();
		for (size_t i = 0; i < hot / CYCLE_TICKS + 1; i++, writes++)
			memory[writes % hot * stride * PAGE_WORDS + writes / hot % PAGE_WORDS] =
				mix(~writes);
		if (requested())
			say("report writes=%llu hash=%016llx", (unsigned long long)writes,
			    (unsigned long long)hash(memory, words));
	}
}
