/* The program's files are its own: none more, none kept open. Prints how many it has, then closes its standard output
 * and works on. */
#include "common.h"
#include <dirent.h>

static int count(const char *path)
{
	DIR *dir = opendir(path);
	int n = 0;

	CHECK(dir);
	while (readdir(dir))
		n++;
	closedir(dir);
	return n - 2;
}

int main(void)
{
	size_t bytes = 16 * MIB;
	char *at = map(bytes);
	double end = now() + WORK;

	while (now() < end) {
		fill(at, bytes, 1);
		check(at, bytes, 1);
	}
	/* One of them is the directory. */
	printf("%d files\n", count("/proc/self/fd"));
	fflush(stdout);
	close(STDOUT_FILENO);
	/* Until the reader has seen the end. */
	CHECK(getchar() == EOF);
	check(at, bytes, 1);
	return 0;
}
