/* Fills memory, and checks it again and again. Arguments: how many MiB; for how many seconds; how many milliseconds to
 * pause after each MiB when it is filled for the first time. */
#include "common.h"

int main(int argc, char **argv)
{
	size_t bytes = (argc > 1 ? atoi(argv[1]) : 32) * MIB;
	double last = argc > 2 ? atof(argv[2]) : WORK;
	char *at = map(bytes);
	uint64_t seed = 1;
	double end;

	for (size_t n = 0; n < bytes; n += MIB) {
		fill(at + n, MIB, seed + n);
		if (argc > 3)
			usleep(1000 * atoi(argv[3]));
	}
	for (size_t n = 0; n < bytes; n += MIB)
		check(at + n, MIB, seed + n);
	fill(at, bytes, seed);
	for (end = now() + last; now() < end;) {
		check(at, bytes, seed);
		fill(at, bytes, ++seed);
	}
	check(at, bytes, seed);
	return 0;
}
