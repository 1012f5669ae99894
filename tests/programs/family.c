/*
 * family LOG MIB: processes of different users over shared memory.
 *
 *     parent (root) --+-- 1001 --- 1003
 *                     +-- 1002
 *
 * Each child has private memory of its own content besides, and beats on the shared board. When
 * asked, each hashes what it sees of both: the shared hashes have to be equal, and the same before
 * and after a migration. A beat count in a child's private memory has to agree with the shared one.
 *
 * Both kinds of shared memory are here: the words are a System V segment, in an IPC namespace of
 * the family's own, as CRIU wants it; the board is an anonymous mapping, which CRIU takes for a
 * memfd. It pre-dumps neither (cr_dump_shmem of shmem.c, handle_vma of proc_parse.c in 4.1.1): what
 * is shared is sent in the last round, and so the private memory is the larger part here.
 */
#include "report.h"
#include "content.h"
#include <grp.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/shm.h>

#define CHILDREN 3
#define PRIVATE_WORDS ((size_t)16 * (1 << 20) / sizeof(uint64_t))

struct child {
	_Atomic uint64_t beats, answered;
	uint64_t shared_hash, private_hash;
	int uid, consistent;
};

static struct {
	_Atomic uint64_t epoch;
	struct child children[CHILDREN];
} *board;
static uint64_t *words;
static size_t word_count;

static void become(int uid)
{
	if (setgroups(0, NULL) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid))
		die("another user");
}

static void live(unsigned me)
{
	struct child *self = &board->children[me];
	struct timespec pause = { .tv_nsec = TICK_NS };
	uint64_t *mine = mmap(NULL, PRIVATE_WORDS * sizeof(*mine), PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile uint64_t beats = 0;

	if (mine == MAP_FAILED)
		die("private memory");
	for (size_t i = 0; i < PRIVATE_WORDS; i++)
		mine[i] = mix((uint64_t)(me + 1) << 32 | i);
	for (;;) {
		uint64_t epoch = board->epoch;
		uid_t real, effective, saved;

		if (epoch != self->answered) {
			if (getresuid(&real, &effective, &saved) || real != effective || real != saved)
				die("uid");
			self->uid = (int)real;
			self->shared_hash = hash(words, word_count);
			self->private_hash = hash(mine, PRIVATE_WORDS);
			self->consistent = beats == self->beats;
			self->answered = epoch;
		}
		beats++;
		self->beats++;
		nanosleep(&pause, NULL);
	}
}

static pid_t fork_or_die(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	return pid;
}

static void report(void)
{
	struct timespec pause = { .tv_nsec = TICK_NS };
	char text[400] = "";

	board->epoch++;
	for (unsigned i = 0; i < CHILDREN; i++) {
		struct child *child = &board->children[i];
		size_t used = strlen(text);

		while (child->answered != board->epoch)
			nanosleep(&pause, NULL);
		snprintf(text + used, sizeof(text) - used, " child=%d,%016llx,%016llx,%d,%llu",
			 child->uid, (unsigned long long)child->shared_hash,
			 (unsigned long long)child->private_hash, child->consistent,
			 (unsigned long long)child->beats);
	}
	say("report shared=%016llx%s", (unsigned long long)hash(words, word_count), text);
}

int main(int argc, char **argv)
{
	int segment;

	if (argc != 3)
		return 64;
	open_log(argv[1]);
	block_requests();
	word_count = (size_t)atoi(argv[2]) * (1 << 20) / sizeof(*words);
	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (board == MAP_FAILED)
		die("mmap");
	if (unshare(CLONE_NEWIPC))
		die("unshare");
	/* Open to all: the children are other users when CRIU attaches them again. */
	segment = shmget(IPC_PRIVATE, word_count * sizeof(*words), IPC_CREAT | 0666);
	if (segment < 0)
		die("shmget");
	words = shmat(segment, NULL, 0);
	if (words == (void *)-1)
		die("shmat");
	for (size_t i = 0; i < word_count; i++)
		words[i] = mix(i + 1);
	if (fork_or_die() == 0) {
		if (fork_or_die() == 0) {
			become(1003);
			live(2);
		}
		become(1001);
		live(0);
	}
	if (fork_or_die() == 0) {
		become(1002);
		live(1);
	}
	/* A report takes an answer of each: they are all there. */
	report();
	say("ready");
	for (;;) {
		tick();
		if (requested())
			report();
	}
}
