/*
 * memory LOG MIB THREADS: threads that own a share of the memory each, and hash it when asked.
 *
 * The memory is filled once, with bytes that do not repeat and do not compress, so that a page
 * that is lost, doubled or misplaced changes the hash. The threads beat while they wait: a report
 * shows that all of them live.
 */
#include "report.h"
#include "content.h"
#include <pthread.h>
#include <sys/mman.h>

#define MAX_THREADS 16

static uint64_t *memory;
static size_t words_per_thread;
static unsigned threads;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned epoch, answered;
static uint64_t hashes[MAX_THREADS];
static volatile uint64_t beats[MAX_THREADS];

static void answer(void)
{
	char list[MAX_THREADS * 22] = "";

	for (unsigned i = 0; i < threads; i++)
		snprintf(list + strlen(list), 22, "%s%llu", i ? "," : "",
			 (unsigned long long)beats[i]);
	say("report hash=%016llx beats=%s", (unsigned long long)hash(hashes, threads), list);
}

static void *worker(void *argument)
{
	unsigned me = (unsigned)(uintptr_t)argument, seen = 0;
	struct timespec pause = { .tv_nsec = TICK_NS };

	for (;;) {
		unsigned wanted;

		pthread_mutex_lock(&lock);
		wanted = epoch;
		pthread_mutex_unlock(&lock);
		if (wanted != seen) {
			seen = wanted;
			hashes[me] = hash(memory + me * words_per_thread, words_per_thread);
			pthread_mutex_lock(&lock);
			if (++answered == threads) {
				answered = 0;
				answer();
			}
			pthread_mutex_unlock(&lock);
		}
		beats[me]++;
		nanosleep(&pause, NULL);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	size_t bytes;

	if (argc != 4)
		return 64;
	open_log(argv[1]);
	block_requests();
	threads = atoi(argv[3]);
	if (threads < 1 || threads > MAX_THREADS)
		return 64;
	words_per_thread = (size_t)atoi(argv[2]) * (1 << 20) / sizeof(*memory) / threads;
	bytes = words_per_thread * threads * sizeof(*memory);
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	for (size_t i = 0; i < words_per_thread * threads; i++)
		memory[i] = mix(i + 1);
	for (unsigned i = 0; i < threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, worker, (void *)(uintptr_t)i))
			die("pthread_create");
	}
	say("ready");
	for (;;) {
		tick();
		if (requested()) {
			pthread_mutex_lock(&lock);
			epoch++;
			pthread_mutex_unlock(&lock);
		}
	}
}
