/* As many mappings as a process may have, or nearly. */
#include "common.h"

int main(void)
{
	size_t count = 60000, bytes = count * PAGE;
	char *at = map(bytes);
	double end;
	size_t split = 0;

	for (size_t n = 0; n < count; n++)
		fill(at + n * PAGE, PAGE, n);
	/* The engine needs some too: how many are left to the program is not promised, only that nothing is lost. */
	for (size_t n = 0; n < count; n += 2) {
		if (mprotect(at + n * PAGE, PAGE, PROT_READ) != 0) {
			CHECK(errno == ENOMEM);
			break;
		}
		split++;
	}
	CHECK(split > count / 4);
	for (end = now() + WORK; now() < end;)
		for (size_t n = 0; n < count; n++)
			check(at + n * PAGE, PAGE, n);
	CHECK(munmap(at, bytes) == 0);
	return 0;
}
