/* All memory locked, present and future; huge pages off. */
#include "common.h"
#include <sys/prctl.h>

int main(int argc, char **argv)
{
	size_t bytes = 16 * MIB;
	char *early = map(bytes), *late;
	double end;

	fill(early, bytes, 1);
	/* With an engine there already, or before there is one. */
	if (argc > 1 && strcmp(argv[1], "late") == 0)
		usleep(200000);
	CHECK(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0);
	if (mlockall(MCL_CURRENT | MCL_FUTURE) != 0) {
		CHECK(errno == EPERM || errno == ENOMEM);
		fputs("may not lock memory\n", stderr);
		return 0;
	}
	puts("locked");
	late = map(bytes);
	fill(late, bytes, 2);
	for (end = now() + WORK; now() < end;) {
		check(early, bytes, 1);
		check(late, bytes, 2);
		free(memset(malloc(MIB), 1, MIB));
	}
	CHECK(munlockall() == 0);
	check(early, bytes, 1);
	check(late, bytes, 2);
	return 0;
}
