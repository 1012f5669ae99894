/*
 * Process 1 of a test host. It reaps what is orphaned, and ends when its standard input does: the
 * test holds the other end of that pipe, so when the test ends, however it ends, the kernel kills
 * this process and with it everything that runs in the host, and takes the namespaces away.
 */
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	char byte;

	/* Children of a process that ignores SIGCHLD leave no zombies. */
	signal(SIGCHLD, SIG_IGN);
	puts("ready");
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
