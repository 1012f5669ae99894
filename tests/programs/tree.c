/*
 * tree LOG: a family of processes with something of everything between them, checked by itself.
 *
 *     parent --+-- reader --- grandchild
 *              +-- writer
 *              +-- zombie (exited, not waited for)
 *
 * arm() puts data in flight and values in place; then nobody touches them until the test asks
 * (SIGUSR1). Then check() wants everything as arm() left it, and arms anew. A migration between
 * the two is to go unnoticed.
 */
#include "report.h"
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#define SHARED_WORDS (1 << 17) /* 1 MiB */
#define DELETED_BYTES 65536
#define PIPE_BYTES 50000 /* more than a page, less than a pipe holds */
#define ZOMBIE_STATUS 7
#define EVENTS 41

enum { READER, WRITER, GRANDCHILD, CHILDREN };

static struct {
	volatile uint64_t calls[CHILDREN];
	uint64_t words[SHARED_WORDS];
} *shared;

static int data_pipe[2];   /* parent -> reader, full of data while armed */
static int datagrams[2];   /* reader -> writer, two packets waiting while armed */
static int streams[2];     /* writer -> parent, bytes waiting while armed */
static int named[2];       /* a connection through the listening socket: parent, writer */
static int listener, event_fd, deleted_fd;
static int commands[CHILDREN][2]; /* seqpacket pairs: parent's end, child's end */
static pid_t pids[CHILDREN], zombie;
static char socket_path[sizeof(((struct sockaddr_un *)0)->sun_path)];
static unsigned round_number;

static unsigned char pattern(size_t position, unsigned seed)
{
	return (unsigned char)((position * 2654435761u + seed * 40503u) >> 13);
}

static void fill(unsigned char *bytes, size_t count, unsigned seed)
{
	for (size_t i = 0; i < count; i++)
		bytes[i] = pattern(i, seed);
}

static bool is_filled(const unsigned char *bytes, size_t count, unsigned seed)
{
	for (size_t i = 0; i < count; i++)
		if (bytes[i] != pattern(i, seed))
			return false;
	return true;
}

static bool read_all(int fd, void *bytes, size_t count)
{
	while (count > 0) {
		ssize_t got = read(fd, bytes, count);

		if (got <= 0)
			return false;
		bytes = (char *)bytes + got;
		count -= got;
	}
	return true;
}

/* One command byte and the round; the answer is 0 or the number of what is wrong. */
struct order {
	char what;
	unsigned round;
};

static int command(int child, char what)
{
	struct order order = { what, round_number };
	int answer;

	if (write(commands[child][0], &order, sizeof(order)) != sizeof(order) ||
	    read(commands[child][0], &answer, sizeof(answer)) != sizeof(answer))
		return -1;
	return answer;
}

static int connect_named(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	strcpy(address.sun_path, socket_path);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return -1;
	return fd;
}

static int reader(struct order order)
{
	static unsigned char bytes[PIPE_BYTES];
	char text[32];

	if (order.what == 'a') {
		for (int i = 0; i < 2; i++) {
			int length = snprintf(text, sizeof(text), "packet %d of %u", i, order.round);

			if (write(datagrams[0], text, length) != length)
				return 11;
		}
		return 0;
	}
	if (!read_all(data_pipe[0], bytes, sizeof(bytes)))
		return 12;
	return is_filled(bytes, sizeof(bytes), order.round) ? 0 : 13;
}

static int writer(struct order order)
{
	char text[64], wanted[64];

	if (order.what == 'a') {
		int length = snprintf(text, sizeof(text), "stream of %u", order.round);

		return write(streams[1], text, length) == length ? 0 : 21;
	}
	for (int i = 0; i < 2; i++) {
		ssize_t got = read(datagrams[1], text, sizeof(text));
		int length = snprintf(wanted, sizeof(wanted), "packet %d of %u", i, order.round);

		if (got != length || memcmp(text, wanted, length))
			return 22;
	}
	if (read(datagrams[1], text, 1) >= 0 || errno != EAGAIN)
		return 23; /* a packet was doubled */
	if (write(named[1], "named", 5) != 5)
		return 24;
	int again = connect_named();
	if (again < 0 || write(again, "again", 5) != 5)
		return 25;
	close(again);
	return 0;
}

static int grandchild(struct order order)
{
	struct stat stat;

	(void)order;
	if (getppid() != pids[READER])
		return 31;
	if (fstat(deleted_fd, &stat) || stat.st_nlink != 0)
		return 32;
	return 0;
}

static int (*const roles[CHILDREN])(struct order) = { reader, writer, grandchild };

static void serve(int child)
{
	struct order order;

	while (read(commands[child][1], &order, sizeof(order)) == sizeof(order)) {
		int answer = roles[child](order);

		shared->calls[child]++;
		if (write(commands[child][1], &answer, sizeof(answer)) != sizeof(answer))
			break;
	}
	_exit(3);
}

static pid_t fork_or_die(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	return pid;
}

/* Puts everything in place that check() wants to find. */
static void arm(void)
{
	static unsigned char bytes[PIPE_BYTES];
	uint64_t events = EVENTS;

	round_number++;
	fill(bytes, sizeof(bytes), round_number);
	if (write(data_pipe[1], bytes, sizeof(bytes)) != sizeof(bytes))
		die("fill the pipe");
	if (command(READER, 'a') || command(WRITER, 'a'))
		die("arm the children");
	if (write(event_fd, &events, sizeof(events)) != sizeof(events))
		die("eventfd");
	for (size_t i = 0; i < SHARED_WORDS; i++)
		shared->words[i] = i * 31 + round_number;
	if (lseek(deleted_fd, 1000 + round_number, SEEK_SET) < 0)
		die("lseek");
	zombie = fork_or_die();
	if (zombie == 0)
		_exit(ZOMBIE_STATUS);
	/* It is a zombie once it can be waited for; leave it in that state. */
	siginfo_t info;
	if (waitid(P_PID, zombie, &info, WEXITED | WNOWAIT))
		die("zombie");
}

static const char *check(void)
{
	static unsigned char bytes[DELETED_BYTES];
	char text[64], wanted[64];
	uint64_t events, calls[CHILDREN];
	struct stat stat;
	int answer, length, status;

	for (int i = 0; i < CHILDREN; i++)
		calls[i] = shared->calls[i];
	for (int i = 0; i < CHILDREN; i++) {
		answer = command(i, 'c');
		if (answer) {
			static char problem[64];

			snprintf(problem, sizeof(problem), "child %d says %d", i, answer);
			return problem;
		}
		if (shared->calls[i] != calls[i] + 1)
			return "the shared mapping is not shared with a child";
	}
	for (size_t i = 0; i < SHARED_WORDS; i++)
		if (shared->words[i] != i * 31 + round_number)
			return "the shared mapping changed";
	length = snprintf(wanted, sizeof(wanted), "stream of %u", round_number);
	if (!read_all(streams[0], text, length) || memcmp(text, wanted, length))
		return "the socket pair lost what was in flight";
	if (!read_all(named[0], text, 5) || memcmp(text, "named", 5))
		return "the named socket's connection is broken";
	int accepted = accept(listener, NULL, NULL);
	if (accepted < 0 || !read_all(accepted, text, 5) || memcmp(text, "again", 5))
		return "the listening socket does not accept";
	close(accepted);
	if (read(event_fd, &events, sizeof(events)) != sizeof(events) || events != EVENTS)
		return "the eventfd has another value";
	if (lseek(deleted_fd, 0, SEEK_CUR) != 1000 + (off_t)round_number)
		return "the deleted file has another offset";
	if (pread(deleted_fd, bytes, sizeof(bytes), 0) != sizeof(bytes) ||
	    !is_filled(bytes, sizeof(bytes), 0))
		return "the deleted file has another content";
	if (fstat(deleted_fd, &stat) || stat.st_nlink != 0 || stat.st_size != DELETED_BYTES)
		return "the deleted file has another size or a name";
	if (waitpid(zombie, &status, 0) != zombie || !WIFEXITED(status) ||
	    WEXITSTATUS(status) != ZOMBIE_STATUS)
		return "the zombie is gone or has another status";
	return NULL;
}

static void make_objects(const char *log_path)
{
	static unsigned char bytes[DELETED_BYTES];
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char path[256];

	if (snprintf(socket_path, sizeof(socket_path), "%s.sock", log_path) >=
	    (int)sizeof(socket_path))
		die("the socket's path is too long");
	snprintf(path, sizeof(path), "%s.deleted", log_path);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED || pipe(data_pipe) ||
	    socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, datagrams) ||
	    socketpair(AF_UNIX, SOCK_STREAM, 0, streams))
		die("objects");
	for (int i = 0; i < CHILDREN; i++)
		if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, commands[i]))
			die("commands");
	event_fd = eventfd(0, 0);
	deleted_fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	fill(bytes, sizeof(bytes), 0);
	if (event_fd < 0 || deleted_fd < 0 ||
	    write(deleted_fd, bytes, sizeof(bytes)) != sizeof(bytes) || unlink(path))
		die("deleted file");

	strcpy(address.sun_path, socket_path);
	listener = socket(AF_UNIX, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) ||
	    listen(listener, 4))
		die("listener");
	named[1] = connect_named();
	named[0] = accept(listener, NULL, NULL);
	if (named[0] < 0 || named[1] < 0)
		die("named connection");
}

static void make_family(void)
{
	pids[READER] = fork_or_die();
	if (pids[READER] == 0) {
		pids[READER] = getpid();
		pids[GRANDCHILD] = fork_or_die();
		serve(pids[GRANDCHILD] == 0 ? GRANDCHILD : READER);
	}
	pids[WRITER] = fork_or_die();
	if (pids[WRITER] == 0)
		serve(WRITER);
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 64;
	open_log(argv[1]);
	block_requests();
	make_objects(argv[1]);
	make_family();
	arm();
	say("ready");
	for (;;) {
		tick();
		if (requested()) {
			const char *problem = check();

			if (problem) {
				say("report round=%u failed=%s", round_number, problem);
				return 1;
			}
			say("report round=%u ok pids=%d,%d", round_number, pids[READER],
			    pids[WRITER]);
			arm();
		}
	}
}
