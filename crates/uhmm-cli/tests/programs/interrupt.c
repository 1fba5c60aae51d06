/* Works until SIGINT or SIGTERM, then checks everything and says so. */
#include "common.h"

static volatile sig_atomic_t got, count;

static void on_signal(int signal)
{
	got = signal;
	count++;
}

int main(void)
{
	size_t bytes = 16 * MIB;
	char *at = map(bytes);
	double end = now() + 60;
	uint64_t seed = 1;

	signal(SIGINT, on_signal);
	signal(SIGTERM, on_signal);
	fill(at, bytes, seed);
	puts("ready");
	fflush(stdout);
	while (!got && now() < end) {
		check(at, bytes, seed);
		fill(at, bytes, ++seed);
	}
	CHECK(got);
	check(at, bytes, seed);
	/* A second copy of the signal would come about now. */
	usleep(50000);
	printf("signal %d, %d times\n", got, count);
	return 40 + got;
}
