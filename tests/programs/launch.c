/*
 * launch PROGRAM [ARGUMENT...]: starts a program the way CRIU can dump it, prints its pid.
 *
 * The program leads a session of its own, has /dev/null as standard streams and no other inherited
 * descriptor, and is orphaned, so that nothing in it points out of the tree that is dumped.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int report[2], error = 0;
	pid_t pid;

	if (argc < 2)
		return 64;
	/* Low numbers, because everything above them is closed in the program. */
	close_range(3, ~0U, 0);
	if (pipe2(report, O_CLOEXEC))
		return 1;
	pid = fork();
	if (pid < 0)
		return 1;
	if (pid == 0) {
		int null = open("/dev/null", O_RDWR | O_CLOEXEC);

		if (setsid() < 0 || null < 0 || chdir("/") || dup2(null, 0) < 0 ||
		    dup2(null, 1) < 0 || dup2(null, 2) < 0)
			error = errno;
		else
			/* Only close-on-exec descriptors are left above 2. */
			execv(argv[1], argv + 1);
		error = error ? error : errno;
		if (write(report[1], &error, sizeof(error)) != sizeof(error))
			_exit(126);
		_exit(127);
	}
	close(report[1]);
	if (read(report[0], &error, sizeof(error)) > 0) {
		fprintf(stderr, "%s: %s\n", argv[1], strerror(error));
		return 1;
	}
	printf("%d\n", pid);
	return 0;
}
