/* Children, and children of children, see the moment of their fork; a spawned one shares the memory. */
#include "common.h"
#include <spawn.h>

extern char **environ;

static char *at;
static size_t bytes = 8 * MIB;

static void *scribble(void *stop)
{
	char *own = map(MIB);

	for (uint64_t seed = 1; !*(volatile int *)stop; seed++) {
		fill(own, MIB, seed);
		check(own, MIB, seed);
	}
	return NULL;
}

static int child(int depth, uint64_t seed)
{
	pid_t pid;
	int status;

	check(at, bytes, seed);
	if (depth > 0) {
		pid = fork();
		CHECK(pid >= 0);
		if (pid == 0)
			_exit(child(depth - 1, seed));
		fill(at, bytes, seed + 1);
		check(at, bytes, seed + 1);
		CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	} else {
		usleep(60000);
		check(at, bytes, seed);
	}
	return 0;
}

int main(void)
{
	volatile int stop = 0;
	double end = now() + WORK;
	uint64_t seed = 1;
	pthread_t thread;

	at = map(bytes);
	CHECK(pthread_create(&thread, NULL, scribble, (void *)&stop) == 0);
	while (now() < end) {
		char *arguments[] = { "true", NULL };
		pid_t pid, spawned;
		int status;

		fill(at, bytes, ++seed);
		pid = fork();
		CHECK(pid >= 0);
		if (pid == 0)
			_exit(child(2, seed));
		fill(at, bytes, ++seed);
		CHECK(posix_spawnp(&spawned, "true", NULL, NULL, arguments, environ) == 0);
		CHECK(waitpid(spawned, &status, 0) == spawned && status == 0);
		CHECK(waitpid(pid, &status, 0) == pid);
		if (status != 0) {
			fprintf(stderr, "a child ended with status %#x\n", status);
			return 1;
		}
		check(at, bytes, seed);
	}
	stop = 1;
	CHECK(pthread_join(thread, NULL) == 0);
	return 0;
}
