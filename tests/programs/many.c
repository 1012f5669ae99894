/*
 * many LOG KIND COUNT: a process of many small things: `mappings` of a page each, `threads`, or `tasks`.
 *
 * When asked, it hashes its own pages (mappings), or says which of the others beat (threads, tasks).
 */
#include "report.h"
#include "content.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#define MAX_COUNT 65536
#define BEAT_NS (200 * 1000 * 1000)

static size_t page, count;
static uint8_t *memory;
/* Of what is in it all have a view. */
static _Atomic uint64_t *beats;

static void beat(size_t me)
{
	struct timespec pause = { .tv_nsec = BEAT_NS };

	for (;;) {
		atomic_fetch_add(&beats[me], 1);
		nanosleep(&pause, NULL);
	}
}

static void *thread(void *me)
{
	beat((uintptr_t)me);
	return NULL;
}

/* Neighbours have other rights, so that the kernel keeps them apart. */
static void make_mappings(void)
{
	memory = mmap(NULL, count * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	for (size_t i = 0; i < count; i++)
		for (size_t word = 0; word < page / sizeof(uint64_t); word++)
			((uint64_t *)(memory + i * page))[word] = mix(i * page + word);
	for (size_t i = 0; i < count; i += 2)
		if (mprotect(memory + i * page, page, PROT_READ))
			die("mprotect");
}

static void make_threads(void)
{
	pthread_attr_t small;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 << 10);
	for (size_t i = 0; i < count; i++) {
		pthread_t made;

		if (pthread_create(&made, &small, thread, (void *)(uintptr_t)i))
			die("pthread_create");
	}
}

static void make_tasks(void)
{
	for (size_t i = 0; i < count; i++) {
		pid_t made = fork();

		if (made < 0)
			die("fork");
		if (made == 0) {
			/* It goes with its parent. */
			if (prctl(PR_SET_PDEATHSIG, SIGKILL))
				die("prctl");
			beat(i);
		}
	}
}

static void report(void)
{
	uint64_t alive = 0, sum = 0, *before;
	struct timespec pause = { .tv_nsec = BEAT_NS * 3L / 2 };

	if (memory)
		sum = hash((uint64_t *)memory, count * page / sizeof(uint64_t));
	before = calloc(count, sizeof(*before));
	if (!before)
		die("calloc");
	for (size_t i = 0; i < count; i++)
		before[i] = atomic_load(&beats[i]);
	if (!memory)
		nanosleep(&pause, NULL);
	for (size_t i = 0; i < count; i++)
		alive += atomic_load(&beats[i]) > before[i];
	free(before);
	say("report hash=%016llx alive=%llu", (unsigned long long)sum, (unsigned long long)alive);
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 64;
	open_log(argv[1]);
	block_requests();
	page = (size_t)sysconf(_SC_PAGESIZE);
	count = (size_t)atoi(argv[3]);
	if (count < 1 || count > MAX_COUNT)
		return 64;
	beats = mmap(NULL, count * sizeof(*beats), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (beats == MAP_FAILED)
		die("mmap");
	/* Nobody waits for children. */
	signal(SIGCHLD, SIG_IGN);
	if (!strcmp(argv[2], "mappings"))
		make_mappings();
	else if (!strcmp(argv[2], "threads"))
		make_threads();
	else if (!strcmp(argv[2], "tasks"))
		make_tasks();
	else
		return 64;
	say("ready");
	for (;;) {
		tick();
		if (requested())
			report();
	}
}
