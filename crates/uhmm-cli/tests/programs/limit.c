/* Limits of address space are what they are without uhmm. */
#include "common.h"

static void expect(rlim_t soft, rlim_t hard)
{
	struct rlimit limit;

	CHECK(getrlimit(RLIMIT_AS, &limit) == 0);
	CHECK(limit.rlim_cur == soft && limit.rlim_max == hard);
	CHECK(prlimit(0, RLIMIT_AS, NULL, &limit) == 0);
	CHECK(limit.rlim_cur == soft && limit.rlim_max == hard);
}

int main(int argc, char **argv)
{
	rlim_t soft = 1024 * MIB, hard = 2048 * MIB;
	struct rlimit limit = { soft, hard };
	void *small, *large;

	if (argc == 1) {
		CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
	} else if (strcmp(argv[1], "late") == 0) {
		/* With an engine there already. */
		usleep(200000);
		CHECK(prlimit(0, RLIMIT_AS, &limit, NULL) == 0);
	} else {
		/* The limit was set by whoever executed this. */
		CHECK(strcmp(argv[1], "inherited") == 0);
	}
	expect(soft, hard);
	for (double end = now() + WORK / 2; now() < end;) {
		small = mmap(NULL, 512 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		CHECK(small != MAP_FAILED);
		fill(small, MIB, 3);
		check(small, MIB, 3);
		CHECK(munmap(small, 512 * MIB) == 0);
	}
	large = mmap(NULL, 16384 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(large == MAP_FAILED && errno == ENOMEM);
	expect(soft, hard);
	if (argc == 1) {
		/* A program executed in place, and one in a child. */
		pid_t pid = vfork();
		int status;

		if (pid == 0) {
			execl(argv[0], argv[0], "inherited", NULL);
			_exit(9);
		}
		CHECK(waitpid(pid, &status, 0) == pid && status == 0);
		execl(argv[0], argv[0], "inherited", NULL);
		fail("execl");
	}
	return 0;
}
