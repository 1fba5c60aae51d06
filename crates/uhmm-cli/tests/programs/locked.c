/* All memory locked, present and future; huge pages off. */
#include "common.h"
#include <sys/prctl.h>

/* Memory that moves and grows: the kernel fills what it grows by at once. */
static void grow(void)
{
	size_t bytes = 4 * MIB;
	char *at = map(bytes), *to;

	fill(at, bytes, 3);
	usleep(5000);
	to = mremap(at, bytes, 2 * bytes, MREMAP_MAYMOVE);
	CHECK(to != MAP_FAILED);
	check(to, bytes, 3);
	CHECK(to[bytes] == 0 && to[2 * bytes - 1] == 0);
	CHECK(munmap(to, 2 * bytes) == 0);
}

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
		grow();
	}
	CHECK(munlockall() == 0);
	check(early, bytes, 1);
	check(late, bytes, 2);
	return 0;
}
