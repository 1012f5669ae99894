/*
 * What the test programs have in common: a log file that the test reads, and a steady tick.
 *
 * Every record is one line, written by one write() to a file opened with O_APPEND, so that a
 * reader never sees a mixture of two records. A tick carries its number, which lives only in the
 * process's memory, and the monotonic clock, from which the reader sees how long the process
 * stood still.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS (5 * 1000 * 1000)

static int log_fd = -1;
static uint64_t ticks;

static void die(const char *what)
{
	dprintf(log_fd >= 0 ? log_fd : 2, "fatal %s: %s\n", what, strerror(errno));
	_exit(1);
}

static void open_log(const char *path)
{
	log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (log_fd < 0)
		die(path);
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	int length;

	va_start(args, format);
	length = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	line[length] = '\n';
	if (write(log_fd, line, length + 1) != length + 1)
		_exit(2);
}

static void tick(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	ticks++;
	say("tick %llu %llu", (unsigned long long)ticks,
	    (unsigned long long)now.tv_sec * 1000000000ull + now.tv_nsec);
}

/* To be called before any thread or child exists: SIGUSR1 is the test's request for a report. */
static void block_requests(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	if (sigprocmask(SIG_BLOCK, &set, NULL))
		die("sigprocmask");
}

/* Sleeps for one tick; 1 if a report was asked for. */
static int requested(void)
{
	struct timespec pause = { .tv_nsec = TICK_NS };
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	return sigtimedwait(&set, NULL, &pause) == SIGUSR1;
}
