#include <stdint.h>

static __thread uint64_t word = 11;
__thread char much[4096];

uint64_t *place(void)
{
	much[0]++;
	return &word;
}
