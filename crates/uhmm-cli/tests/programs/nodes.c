/*
 * The nodes of the kernel's HMM test device, as a program sees them: what each command answers, down to errno and counters.
 * Arguments: the first node, private or coherent (the second is its neighbour), and whether page frames are known ("frames") or
 * not ("blind"): without them no device knows what can be written without a fault.
 */
#include "nodes.h"

static char buffer[16 * 4096];

/* Pages, each filled with a letter of its own. */
static char *filled(uint64_t pages)
{
	char *at = anonymous(pages, PROT_READ | PROT_WRITE);

	for (uint64_t n = 0; n < pages; n++)
		memset(at + n * PAGE, 'A' + n % 26, PAGE);
	return at;
}

/* The byte of a snapshot for a page of the second device's. */
static int remote(int access)
{
	return coherent ? 0x50 | access : 0;
}

static void checks_come_in_order(void)
{
	char *at = filled(2);

	SAME(ask(nodes[0], READ, at + 1, buffer, 1), -EINVAL);
	SAME(ask(nodes[0], READ, at, buffer, 0), -EINVAL);
	SAME(ask(nodes[0], READ, at, buffer, UINT64_MAX / PAGE), -EINVAL);
	SAME(ask(nodes[0], 10, at, buffer, 1), -EINVAL);
	SAME(ask(nodes[0], 99, at, buffer, 1), -EINVAL);
	SAME(ioctl(nodes[0], _IOWR('H', READ, struct command), (void *)8), -1);
	SAME(errno, EFAULT);
	SAME(ioctl(nodes[0], 12345, (void *)8), -1);
	SAME(errno, EFAULT);
	SAME(ask(nodes[0], READ, at, (void *)8, 1), -EFAULT);
	SAME(ask(nodes[0], WRITE, at, (void *)8, 1), -EFAULT);
	SAME(ask(nodes[0], SNAPSHOT, at, (void *)8, 1), -EFAULT);
	SAME(ask(nodes[0], TO_DEVICE, at, (void *)8, 1), -EFAULT);
	SAME(at[0], 'A');
	munmap(at, 2 * PAGE);
}

static void faults_are_counted(void)
{
	char *at = filled(4);

	SAME(ask(nodes[0], READ, at, buffer, 4), 0);
	SAME(told.copied, 4);
	SAME(told.faults, 1);
	SAME(memcmp(at, buffer, 4 * PAGE), 0);
	SAME(ask(nodes[0], READ, at, buffer, 4), 0);
	SAME(told.faults, 0);
	memset(buffer, 'w', 4 * PAGE);
	SAME(ask(nodes[0], WRITE, at, buffer, 4), 0);
	SAME(told.faults, frames ? 0 : 1);
	SAME(at[3 * PAGE], 'w');
	CHECK(mprotect(at, 4 * PAGE, PROT_READ) == 0);
	SAME(ask(nodes[0], READ, at, buffer, 4), 0);
	SAME(told.faults, 1);
	SAME(ask(nodes[0], WRITE, at, buffer, 4), -EPERM);
	CHECK(mprotect(at, 4 * PAGE, PROT_READ | PROT_WRITE) == 0);
	SAME(ask(nodes[0], READ_UNLOCKED, at, buffer, 4), 0);
	CHECK(madvise(at + PAGE, PAGE, MADV_DONTNEED) == 0);
	SAME(ask(nodes[0], READ, at, buffer, 4), 0);
	SAME(told.faults, 1);
	SAME(buffer[PAGE], 0);
	SAME(buffer[0], 'w');
	munmap(at, 4 * PAGE);
	SAME(ask(nodes[0], READ, at, buffer, 4), -EFAULT);
}

static void untouched_memory_reads_as_zeros(void)
{
	char *at = anonymous(4, PROT_READ | PROT_WRITE);

	SAME(look(nodes[0], at, 1)[0], 0);
	SAME(ask(nodes[0], READ, at, buffer, 2), 0);
	SAME(look(nodes[0], at, 4)[0], 0x11);
	SAME(seen[2], 0);
	memset(buffer, 'x', PAGE);
	SAME(ask(nodes[0], WRITE, at + 2 * PAGE, buffer, 1), 0);
	SAME(told.faults, 1);
	SAME(look(nodes[0], at, 4)[2], writable());
	munmap(at, 4 * PAGE);
}

static void what_may_not_be_read_is_an_error(void)
{
	char *at = anonymous(3, PROT_WRITE);

	SAME(ask(nodes[0], READ, at, buffer, 1), -EFAULT);
	SAME(ask(nodes[0], WRITE, at, buffer, 1), -EFAULT);
	SAME(look(nodes[0], at, 1)[0], 0xff);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 1), -EINVAL);
	SAME(ask(nodes[0], TO_SYSTEM, at, buffer, 1), -EINVAL);
	CHECK(mprotect(at, PAGE, PROT_NONE) == 0);
	SAME(ask(nodes[0], WRITE, at, buffer, 1), -EFAULT);
	munmap(at + PAGE, PAGE);
	SAME(look(nodes[0], at, 3)[1], 0xff);
	munmap(at, 3 * PAGE);
}

static void pages_go_and_come(void)
{
	char *at = filled(8);

	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 8), 0);
	SAME(told.copied, 8);
	SAME(buffer[7 * PAGE], 'H');
	expect_away(at, 8);
	SAME(look(nodes[0], at, 8)[0], local(2));
	SAME(look(nodes[1], at, 8)[0], remote(2));
	/* Once more is no harm. */
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 8), 0);
	SAME(ask(nodes[0], READ, at, buffer, 8), 0);
	SAME(told.faults, 0);
	/* The CPU brings what it touches, or reaches it. */
	SAME(at[0], 'A');
	SAME(is_present(at), 1);
	SAME(look(nodes[0], at, 1)[0], coherent ? local(2) : writable());
	SAME(ask(nodes[1], TO_SYSTEM, at, buffer, 8), 0);
	SAME(told.copied, 0);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 8), 0);
	SAME(ask(nodes[0], TO_SYSTEM, at, buffer, 8), 0);
	SAME(told.copied, 8);
	for (int n = 0; n < 8; n++) {
		SAME(is_present(at + n * PAGE), 1);
		SAME(at[n * PAGE], 'A' + n);
	}
	SAME(ask(nodes[0], TO_SYSTEM, at, buffer, 8), 0);
	SAME(told.copied, 0);
	munmap(at, 8 * PAGE);
}

static void a_hole_ends_a_migration_and_keeps_what_is_done(void)
{
	char *at = filled(8);

	munmap(at + 4 * PAGE, PAGE);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 8), -EINVAL);
	SAME(look(nodes[0], at, 8)[3], local(2));
	SAME(seen[4], 0xff);
	SAME(seen[5], writable());
	SAME(at[3 * PAGE], 'D');
	munmap(at, 8 * PAGE);
}

static void only_private_anonymous_memory_moves(void)
{
	int file = open("/tmp", O_TMPFILE | O_RDWR, 0600);
	char *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), *at;

	memset(shared, 's', PAGE);
	SAME(ask(nodes[0], TO_DEVICE, shared, buffer, 1), -ENOENT);
	SAME(ask(nodes[0], EXCLUSIVE, shared, buffer, 1), -EOPNOTSUPP);
	SAME(ask(nodes[0], READ, shared, buffer, 1), 0);
	SAME(buffer[9], 's');
	munmap(shared, PAGE);
	if (file < 0)
		return;
	CHECK(write(file, filled(2), 2 * PAGE) == 2 * (long)PAGE);
	at = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 1), -ENOENT);
	SAME(ask(nodes[0], READ, at, buffer, 2), 0);
	SAME(ask(nodes[0], READ, at, buffer, 3), -EFAULT);
	munmap(at, 3 * PAGE);
	at = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 1), -ENOENT);
	SAME(look(nodes[0], at, 1)[0], 0);
	SAME(ask(nodes[0], READ, at, buffer, 1), 0);
	SAME(look(nodes[0], at, 1)[0], 1);
	munmap(at, 2 * PAGE);
	close(file);
}

static void private_memory_of_files_moves_where_it_was_written(void)
{
	int file = open("/tmp", O_TMPFILE | O_RDWR, 0600);
	char *from = filled(4), *at;

	if (file < 0)
		return;
	CHECK(write(file, from, 4 * PAGE) == 4 * (long)PAGE);
	at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	at[PAGE] = 'x';
	at[2 * PAGE] = 'y';
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 4), -ENOENT);
	SAME(look(nodes[0], at, 4)[1], local(2));
	SAME(seen[0], 0);
	SAME(ask(nodes[0], TO_DEVICE, at + PAGE, buffer, 2), 0);
	SAME(buffer[0], 'x');
	SAME(buffer[1], 'B');
	expect_away(at + PAGE, 2);
	SAME(at[2 * PAGE], 'y');
	SAME(at[2 * PAGE + 1], 'C');
	SAME(at[0], 'A');
	/* To hold a page is to have a copy of it. */
	SAME(ask(nodes[0], EXCLUSIVE, at + 3 * PAGE, buffer, 1), 0);
	SAME(ask(nodes[0], CHECK_EXCLUSIVE, at + 3 * PAGE, buffer, 1), -EPERM);
	at[3 * PAGE] = 'z';
	SAME(pread(file, buffer, 4 * PAGE, 0), 4 * PAGE);
	SAME(memcmp(buffer, from, 4 * PAGE), 0);
	/* It is one mapping to the program still. */
	CHECK(mprotect(at, 4 * PAGE, PROT_READ) == 0);
	SAME(at[PAGE], 'x');
	SAME(munmap(at, 4 * PAGE), 0);
	munmap(from, 4 * PAGE);
	close(file);
}

static void zeros_move_too(void)
{
	char *at = anonymous(4, PROT_READ | PROT_WRITE);

	/* The zero page, and never touched. */
	SAME(at[0], 0);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 4), 0);
	SAME(told.copied, 4);
	SAME(look(nodes[0], at, 4)[3], local(2));
	for (int n = 0; n < 4; n++)
		SAME(at[n * PAGE], 0);
	CHECK(mprotect(at, 4 * PAGE, PROT_READ) == 0);
	munmap(at, 4 * PAGE);
}

static void read_only_memory_moves(void)
{
	char *at = filled(2);

	CHECK(mprotect(at, 2 * PAGE, PROT_READ) == 0);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 2), 0);
	SAME(look(nodes[0], at, 2)[1], local(1));
	SAME(ask(nodes[0], WRITE, at, buffer, 1), -EPERM);
	SAME(at[PAGE], 'B');
	SAME(ask(nodes[0], EXCLUSIVE, at, buffer, 2), -EFAULT);
	munmap(at, 2 * PAGE);
}

static void without_access_pages_stay_on_the_device(void)
{
	char *at = filled(2);

	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 2), 0);
	CHECK(mprotect(at, 2 * PAGE, PROT_NONE) == 0);
	SAME(look(nodes[0], at, 2)[0], 0xff);
	SAME(ask(nodes[0], READ, at, buffer, 2), -EFAULT);
	SAME(ask(nodes[0], TO_SYSTEM, at, buffer, 2), -EINVAL);
	CHECK(mprotect(at, 2 * PAGE, PROT_READ | PROT_WRITE) == 0);
	if (!coherent)
		SAME(is_present(at), 0);
	SAME(at[0], 'A');
	SAME(at[PAGE], 'B');
	munmap(at, 2 * PAGE);
}

static void advice_is_followed(void)
{
	char *at = filled(6);

	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 6), 0);
	CHECK(madvise(at, PAGE, MADV_DONTNEED) == 0);
	SAME(look(nodes[0], at, 1)[0], 0);
	SAME(at[0], 0);
	CHECK(madvise(at + PAGE, PAGE, MADV_FREE) == 0);
	CHECK(madvise(at + 2 * PAGE, 4 * PAGE, MADV_POPULATE_READ) == 0);
	for (int n = 2; n < 6; n++) {
		SAME(is_present(at + n * PAGE), 1);
		SAME(at[n * PAGE], 'A' + n);
	}
	SAME(at[PAGE] == 'B' || at[PAGE] == 0, 1);
	munmap(at, 6 * PAGE);
}

static void the_kernel_finds_what_is_away(void)
{
	int pipes[2];
	char *at = filled(2), got[16];

	CHECK(pipe(pipes) == 0);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 2), 0);
	SAME(write(pipes[1], at + PAGE, 16), 16);
	SAME(read(pipes[0], got, 16), 16);
	SAME(got[15], 'B');
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 2), 0);
	SAME(write(pipes[1], "0123456789abcdef", 16), 16);
	SAME(read(pipes[0], at, 16), 16);
	SAME(at[15], 'f');
	SAME(at[16], 'A');
	close(pipes[0]);
	close(pipes[1]);
	munmap(at, 2 * PAGE);
}

static void devices_steal_nothing(void)
{
	char *at = filled(4);

	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 4), 0);
	SAME(ask(nodes[1], TO_DEVICE, at, buffer, 4), -ENOENT);
	SAME(look(nodes[0], at, 4)[0], local(2));
	/* To read is to have what is read brought back, and no more. */
	SAME(ask(nodes[1], READ, at + PAGE, buffer, 1), 0);
	SAME(buffer[0], 'B');
	SAME(told.faults, 1);
	if (!coherent) {
		SAME(look(nodes[0], at, 4)[0], local(2));
		SAME(seen[2], local(2));
		SAME(is_present(at + PAGE), 1);
	}
	memset(buffer, '1', PAGE);
	SAME(ask(nodes[1], WRITE, at + 3 * PAGE, buffer, 1), 0);
	SAME(ask(nodes[0], READ, at, buffer, 4), 0);
	SAME(buffer[3 * PAGE], '1');
	SAME(buffer[0], 'A');
	munmap(at, 4 * PAGE);
}

static void exclusive_is_exclusive(void)
{
	char *at = filled(6);

	SAME(ask(nodes[0], EXCLUSIVE, at, buffer, 6), 0);
	SAME(told.copied, 6);
	SAME(buffer[5 * PAGE], 'F');
	SAME(ask(nodes[0], CHECK_EXCLUSIVE, at, buffer, 6), -EPERM);
	SAME(is_swapped(at), 1);
	/* A look is enough. */
	SAME(at[0], 'A');
	SAME(ask(nodes[0], CHECK_EXCLUSIVE, at, buffer, 1), 0);
	SAME(ask(nodes[0], CHECK_EXCLUSIVE, at + PAGE, buffer, 5), -EPERM);
	/* The device's own write ends it. */
	memset(buffer, 'd', PAGE);
	SAME(ask(nodes[0], WRITE, at + PAGE, buffer, 1), 0);
	SAME(told.faults, 1);
	SAME(ask(nodes[0], CHECK_EXCLUSIVE, at + PAGE, buffer, 1), 0);
	/* Another device takes it. */
	SAME(ask(nodes[1], EXCLUSIVE, at + 2 * PAGE, buffer, 1), 0);
	SAME(ask(nodes[0], CHECK_EXCLUSIVE, at + 2 * PAGE, buffer, 1), 0);
	SAME(ask(nodes[1], CHECK_EXCLUSIVE, at + 2 * PAGE, buffer, 1), -EPERM);
	/* And so does a change of the mapping. */
	CHECK(mprotect(at + 3 * PAGE, PAGE, PROT_READ) == 0);
	SAME(ask(nodes[0], WRITE, at + 3 * PAGE, buffer, 1), -EPERM);
	SAME(at[PAGE], 'd');
	SAME(at[2 * PAGE], 'C');
	SAME(at[3 * PAGE], 'D');
	munmap(at, 6 * PAGE);
	SAME(ask(nodes[0], EXCLUSIVE, at, buffer, 1), -EFAULT);
}

static void a_child_has_its_own(void)
{
	char *at = filled(8);
	int status;
	pid_t child;

	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 4), 0);
	SAME(ask(nodes[0], EXCLUSIVE, at + 4 * PAGE, buffer, 4), 0);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		int own = node(coherent ? 2 : 0);

		failures = 0;
		/* What it has from its parent is the parent's. */
		SAME(ask(nodes[0], READ, at, buffer, 1), -EINVAL);
		CHECK(own >= 0);
		SAME(ask(own, CHECK_EXCLUSIVE, at, buffer, 8), 0);
		memset(buffer, 'c', PAGE);
		SAME(ask(own, WRITE, at, buffer, 1), 0);
		SAME(told.faults, 1);
		at[PAGE] = 'k';
		for (int n = 2; n < 8; n++)
			SAME(at[n * PAGE], 'A' + n);
		SAME(ask(own, TO_DEVICE, at, buffer, 8), 0);
		SAME(buffer[0], 'c');
		SAME(buffer[PAGE], 'k');
		close(own);
		SAME(at[0], 'c');
		_exit(failures != 0);
	}
	at[2 * PAGE] = 'p';
	CHECK(waitpid(child, &status, 0) == child);
	SAME(status, 0);
	SAME(ask(nodes[0], CHECK_EXCLUSIVE, at + 4 * PAGE, buffer, 4), 0);
	SAME(ask(nodes[0], READ, at, buffer, 8), 0);
	SAME(buffer[0], 'A');
	SAME(buffer[PAGE], 'B');
	SAME(buffer[2 * PAGE], 'p');
	for (int n = 3; n < 8; n++)
		SAME(at[n * PAGE], 'A' + n);
	munmap(at, 8 * PAGE);
}

static void mappings_move_with_what_is_away(void)
{
	char *at = filled(8), *to = anonymous(16, PROT_NONE), *hole = to + 4 * PAGE, *moved;

	munmap(hole, 8 * PAGE);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 8), 0);
	munmap(at + 2 * PAGE, PAGE);
	moved = mremap(at + 3 * PAGE, 5 * PAGE, 5 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, hole);
	SAME(moved == hole, 1);
	SAME(look(nodes[0], moved, 5)[0], local(2));
	SAME(ask(nodes[0], READ, moved, buffer, 5), 0);
	SAME(buffer[4 * PAGE], 'H');
	SAME(look(nodes[0], at, 8)[1], local(2));
	SAME(seen[2], 0xff);
	SAME(seen[3], 0xff);
	SAME(moved[0], 'D');
	SAME(moved[4 * PAGE], 'H');
	SAME(at[PAGE], 'B');
	/* What stays behind is empty. */
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 2), 0);
	moved = mremap(at, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	CHECK(moved != MAP_FAILED);
	SAME(moved[0], 'A');
	SAME(moved[PAGE], 'B');
	SAME(at[0], 0);
	munmap(moved, 2 * PAGE);
	munmap(at, 2 * PAGE);
	munmap(to, 16 * PAGE);
}

static void an_allocation_that_fails_is_an_error(void)
{
	char *at = filled(2);

	SAME(ask(nodes[0], FLAGS, at, NULL, 1), 0);
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 1), -ENOENT);
	SAME(at[0], 'A');
	SAME(ask(nodes[0], TO_DEVICE, at, buffer, 2), 0);
	SAME(ask(nodes[0], FLAGS, at, NULL, 0), -EINVAL);
	munmap(at, 2 * PAGE);
}

static void release_and_close_return_everything(void)
{
	int more = node(coherent ? 2 : 0), copy = dup(more);
	char *at = filled(4);

	CHECK(more >= 0 && copy >= 0);
	SAME(ask(more, TO_DEVICE, at, buffer, 4), 0);
	SAME(ask(more, RELEASE, at, buffer, 1), 0);
	SAME(look(more, at, 4)[0], writable());
	SAME(ask(copy, TO_DEVICE, at, buffer, 4), 0);
	close(more);
	SAME(look(copy, at, 4)[3], local(2));
	SAME(ask(more, SNAPSHOT, at, seen, 4), -EBADF);
	CHECK(dup2(nodes[1], copy) == copy);
	SAME(look(nodes[0], at, 4)[3], writable());
	SAME(look(copy, at, 4)[3], writable());
	close(copy);
	SAME(at[3 * PAGE], 'D');
	munmap(at, 4 * PAGE);
}

static void a_node_can_be_mapped(void)
{
	char *at = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, nodes[0], 0);

	CHECK(at != MAP_FAILED);
	SAME(look(nodes[0], at, 2)[0], 1);
	SAME(at[PAGE], 0);
	at[PAGE] = 1;
	SAME(ask(nodes[0], READ, at, buffer, 2), 0);
	SAME(buffer[PAGE], 1);
	munmap(at, 2 * PAGE);
	SAME(fcntl(nodes[0], F_GETFD) & FD_CLOEXEC, 0);
	SAME(ioctl(nodes[0], FIOCLEX), 0);
	SAME(fcntl(nodes[0], F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
}

static void pins_keep_pages(void)
{
	char *at = filled(2);
	struct iovec part = { at, PAGE };
	int pipes[2];
	char got[16];

	CHECK(pipe(pipes) == 0);
	/* The pipe has the page itself. */
	SAME(vmsplice(pipes[1], &part, 1, 0), PAGE);
	ask(nodes[0], TO_DEVICE, at, buffer, 2);
	SAME(read(pipes[0], got, 16), 16);
	SAME(got[0], 'A');
	SAME(at[0], 'A');
	SAME(at[PAGE], 'B');
	close(pipes[0]);
	close(pipes[1]);
	munmap(at, 2 * PAGE);
}

static volatile int stop;

static void *hammer(void *arg)
{
	volatile long *at = arg;
	long n = 0;

	while (!stop) {
		n++;
		at[0]++;
		at[PAGE / 8]++;
		CHECK(at[0] == n && at[PAGE / 8] == n);
	}
	return (void *)n;
}

static void no_write_is_lost_while_pages_come_and_go(void)
{
	char *at = anonymous(2, PROT_READ | PROT_WRITE);
	double end = now() + 0.3;
	pthread_t thread;
	void *count;

	CHECK(pthread_create(&thread, NULL, hammer, at) == 0);
	while (now() < end) {
		static const int commands[] = { TO_DEVICE, READ, EXCLUSIVE, TO_SYSTEM, SNAPSHOT };

		for (unsigned n = 0; n < sizeof commands / sizeof *commands; n++)
			ask(nodes[n % 2], commands[n], at, buffer, 2);
	}
	stop = 1;
	CHECK(pthread_join(thread, &count) == 0);
	SAME(*(long *)at, (long)count);
	munmap(at, 2 * PAGE);
}

int main(int argc, char **argv)
{
	/* For users without privileges the page below the thread's own storage stays where it is. Nothing is to lie there. */
	anonymous(16, PROT_NONE);
	SAME(node(4), -1);
	SAME(errno, ENOENT);
	if (!open_nodes(argc, argv))
		return 0;
	checks_come_in_order();
	faults_are_counted();
	untouched_memory_reads_as_zeros();
	what_may_not_be_read_is_an_error();
	pages_go_and_come();
	a_hole_ends_a_migration_and_keeps_what_is_done();
	only_private_anonymous_memory_moves();
	private_memory_of_files_moves_where_it_was_written();
	zeros_move_too();
	read_only_memory_moves();
	without_access_pages_stay_on_the_device();
	advice_is_followed();
	the_kernel_finds_what_is_away();
	devices_steal_nothing();
	exclusive_is_exclusive();
	a_child_has_its_own();
	mappings_move_with_what_is_away();
	an_allocation_that_fails_is_an_error();
	release_and_close_return_everything();
	a_node_can_be_mapped();
	pins_keep_pages();
	no_write_is_lost_while_pages_come_and_go();
	printf("%d failures\n", failures);
	return failures != 0;
}
