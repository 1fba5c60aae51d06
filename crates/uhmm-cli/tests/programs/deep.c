/* A child of a child of a child ...: each lives long enough to have an engine of its own. */
#include "common.h"

int main(void)
{
	size_t bytes = 4 * MIB;
	char *at = map(bytes);

	fill(at, bytes, 1);
	for (int depth = 0; depth < 16; depth++) {
		pid_t pid;
		int status;

		usleep(60000);
		pid = fork();
		CHECK(pid >= 0);
		if (pid != 0) {
			CHECK(waitpid(pid, &status, 0) == pid);
			if (status != 0)
				fprintf(stderr, "the child at depth %d ended with status %#x\n", depth, status);
			check(at, bytes, 1 + depth);
			_exit(status != 0);
		}
		check(at, bytes, 1 + depth);
		fill(at, bytes, 2 + depth);
	}
	check(at, bytes, 17);
	return 0;
}
