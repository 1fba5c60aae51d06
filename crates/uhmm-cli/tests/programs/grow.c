/* Four threads fill memory as fast as they can, and check it once. Argument: how many MiB each. */
#include "common.h"

static size_t bytes;

static void *grow(void *seed)
{
	char *at = map(bytes);

	fill(at, bytes, (uint64_t)seed);
	check(at, bytes, (uint64_t)seed);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[4];

	bytes = (argc > 1 ? atoi(argv[1]) : 32) * MIB;
	for (size_t n = 0; n < 4; n++)
		if (pthread_create(&threads[n], NULL, grow, (void *)(n + 1)))
			return 2;
	for (size_t n = 0; n < 4; n++)
		pthread_join(threads[n], NULL);
	return 0;
}
