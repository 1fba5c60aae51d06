/* A handler for SIGSEGV, on a stack of its own, that makes memory accessible: as garbage collectors do. */
#include "common.h"

static char *heap;
static size_t bytes = 8 * MIB;
static volatile long handled;

static void on_segv(int signal, siginfo_t *info, void *context)
{
	char *page = (char *)((uintptr_t)info->si_addr & ~(PAGE - 1));

	(void)signal;
	(void)context;
	if (page < heap || page >= heap + bytes || info->si_code != SEGV_ACCERR)
		_exit(2);
	if (mprotect(page, PAGE, PROT_READ | PROT_WRITE) != 0)
		_exit(3);
	handled++;
}

int main(void)
{
	stack_t stack = { .ss_sp = map(64 * PAGE), .ss_size = 64 * PAGE };
	struct sigaction action = { .sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	double end = now() + WORK;
	uint64_t seed = 1;
	long rounds = 0;

	heap = map(bytes);
	CHECK(sigaltstack(&stack, NULL) == 0);
	CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
	fill(heap, bytes, seed);
	while (now() < end) {
		CHECK(mprotect(heap, bytes, rounds % 2 ? PROT_NONE : PROT_READ) == 0);
		fill(heap, bytes, ++seed);
		check(heap, bytes, seed);
		rounds++;
	}
	CHECK(handled == rounds * (long)(bytes / PAGE));
	return 0;
}
