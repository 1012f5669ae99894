/* counter LOG: the smallest process worth migrating. It counts, and tells its count when asked. */
#include "report.h"

int main(int argc, char **argv)
{
	if (argc != 2)
		return 64;
	open_log(argv[1]);
	block_requests();
	say("ready");
	for (;;) {
		tick();
		if (requested())
			say("report count=%llu", (unsigned long long)ticks);
	}
}
