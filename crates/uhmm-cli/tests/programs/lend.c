/* Pages lent to a pipe keep their bytes, wherever the program's go. */
#include "common.h"

int main(void)
{
	double end = now() + WORK;
	size_t bytes = 16 * PAGE;
	int pipes[2];

	CHECK(pipe(pipes) == 0);
	for (uint64_t seed = 1; now() < end; seed++) {
		char *lent = map(2 * MIB), *copy = malloc(bytes);
		struct iovec part = { lent, bytes };

		fill(lent, 2 * MIB, seed);
		CHECK(vmsplice(pipes[1], &part, 1, 0) == (ssize_t)bytes);
		/* Let them move, and others use what they were in. */
		for (int n = 0; n < 20; n++) {
			char *other = map(MIB);

			memset(other, n, MIB);
			usleep(500);
			CHECK(munmap(other, MIB) == 0);
			check(lent, 2 * MIB, seed);
		}
		for (size_t n = 0; n < bytes;) {
			ssize_t got = read(pipes[0], copy + n, bytes - n);

			CHECK(got > 0);
			n += got;
		}
		check(copy, bytes, seed);
		free(copy);
		CHECK(munmap(lent, 2 * MIB) == 0);
	}
	return 0;
}
