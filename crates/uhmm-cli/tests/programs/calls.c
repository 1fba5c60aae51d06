/* System calls of many kinds whose memory is on the heap, where any page may be away: all as without uhmm. The argument is
 * how many seconds to go on for. */
#include "common.h"
#include <dirent.h>
#include <setjmp.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <linux/futex.h>

extern char **environ;

/* A heap of pages of its own, so that most of it is cold at any time. */
#define HEAP (24 * MIB)
static char *heap;
/* Nobody writes to it. */
static char *quiet;
#define QUIET (2 * MIB)
static _Thread_local uint64_t seed;

static uint64_t next(void)
{
	seed = seed * 6364136223846793005ul + 1442695040888963407ul;
	return seed >> 33;
}

/* A place on the heap for so many bytes, anywhere, over the edge of a page as often as not. Each thread has a part. */
static _Thread_local char *part;
static _Thread_local size_t part_bytes;

static void *place(size_t bytes)
{
	size_t room = part_bytes - bytes;

	return part + (next() % (room / 8)) * 8;
}

static void *text(const char *from)
{
	return strcpy(place(strlen(from) + 1), from);
}

/* A signal that comes by, though nobody handles it (a child of another thread has ended), cuts such a read short. */
static int read_all(int fd, char *to, size_t bytes)
{
	for (size_t done = 0; done < bytes;) {
		ssize_t got = read(fd, to + done, bytes - done);

		if (got <= 0)
			return 0;
		done += got;
	}
	return 1;
}

static void files(const char *dir)
{
	size_t bytes = 1 + next() % 200000;
	char *from = place(bytes), *to, *path = strdup(dir);
	struct stat *stat;
	struct iovec *parts;
	int fd, count = 1 + next() % 40;
	uint64_t what = next();

	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	CHECK(fd >= 0);
	memset(from, what & 255, bytes);
	CHECK(write(fd, from, bytes) == (ssize_t)bytes);
	to = place(bytes);
	CHECK(pread(fd, to, bytes, 0) == (ssize_t)bytes);
	for (size_t n = 0; n < bytes; n++)
		CHECK((unsigned char)to[n] == (what & 255));
	stat = place(sizeof *stat);
	CHECK(fstat(fd, stat) == 0 && stat->st_size == (off_t)bytes);
	/* Apart from each other, in order, so that what comes back can be told. */
	char *vectors = place(count * 8192);
	parts = malloc(count * sizeof *parts);
	for (int n = 0; n < count; n++) {
		parts[n].iov_base = vectors + n * 8192 + next() % 4096;
		parts[n].iov_len = 1 + next() % 4096;
		memset(parts[n].iov_base, n, parts[n].iov_len);
	}
	ssize_t total = 0;
	for (int n = 0; n < count; n++)
		total += parts[n].iov_len;
	CHECK(pwritev(fd, parts, count, 0) == total);
	for (int n = 0; n < count; n++)
		memset(parts[n].iov_base, 0xff, parts[n].iov_len);
	CHECK(lseek(fd, 0, SEEK_SET) == 0 && readv(fd, parts, count) == total);
	for (int n = 0; n < count; n++)
		for (size_t i = 0; i < parts[n].iov_len; i++)
			CHECK(((unsigned char *)parts[n].iov_base)[i] == n);
	free(parts);
	close(fd);
	CHECK(unlink(path) == 0);
	errno = 0;
	CHECK(access(text(path), F_OK) == -1 && errno == ENOENT);
	free(path);
	/* Fresh memory, never touched. */
	char *fresh = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fd = open("/dev/zero", O_RDONLY);
	CHECK(fresh != MAP_FAILED && fd >= 0 && read_all(fd, fresh, MIB));
	fresh = mremap(fresh, MIB, 3 * MIB, MREMAP_MAYMOVE);
	CHECK(fresh != MAP_FAILED && read_all(fd, fresh, 3 * MIB));
	close(fd);
	munmap(fresh, 3 * MIB);
}

static void streams(const char *dir)
{
	FILE *file = fopen(dir, "w+");
	char *buffer = malloc(70000), *line;
	int lines = 2000 + next() % 2000;

	CHECK(file && buffer && setvbuf(file, buffer, _IOFBF, 70000) == 0);
	for (int n = 0; n < lines; n++)
		CHECK(fprintf(file, "line %d of %d, %s\n", n, lines, "and some more to make it long") > 0);
	CHECK(fflush(file) == 0 && fseek(file, 0, SEEK_SET) == 0);
	line = place(256);
	for (int n = 0; n < lines; n++) {
		int a, b;

		CHECK(fgets(line, 256, file) && sscanf(line, "line %d of %d", &a, &b) == 2 && a == n && b == lines);
	}
	CHECK(!fgets(line, 256, file) && feof(file));
	fclose(file);
	free(buffer);
	unlink(dir);
}

static void sockets(void)
{
	int *pair = place(2 * sizeof *pair), *got;
	struct msghdr *out, *in;
	struct iovec *to, *from;
	char *control, *bytes, *back;
	size_t n = 1 + next() % 60000;
	uint64_t key = next();

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
	int a = pair[0], b = pair[1];
	/* One after the other, for places may overlap. */
	bytes = malloc(n + 8);
	back = malloc(n + 8);
	control = malloc(256);
	to = malloc(2 * sizeof *to);
	from = malloc(2 * sizeof *from);
	CHECK(bytes && back && control && to && from);
	fill(bytes, n, key);
	out = calloc(1, sizeof *out);
	in = calloc(1, sizeof *in);
	from[0] = (struct iovec){ bytes, n / 2 };
	from[1] = (struct iovec){ bytes + n / 2, n - n / 2 };
	*out = (struct msghdr){ .msg_iov = from, .msg_iovlen = 2, .msg_control = control, .msg_controllen = CMSG_SPACE(sizeof(int)) };
	struct cmsghdr *head = CMSG_FIRSTHDR(out);
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(head), &a, sizeof a);
	CHECK(sendmsg(a, out, 0) == (ssize_t)n);
	memset(control, 0, 256);
	to[0] = (struct iovec){ back, n / 3 };
	to[1] = (struct iovec){ back + n / 3, n - n / 3 };
	*in = (struct msghdr){ .msg_iov = to, .msg_iovlen = 2, .msg_control = control, .msg_controllen = 256 };
	CHECK(recvmsg(b, in, 0) == (ssize_t)n);
	CHECK(memcmp(bytes, back, n) == 0);
	head = CMSG_FIRSTHDR(in);
	CHECK(head && head->cmsg_type == SCM_RIGHTS);
	got = (int *)CMSG_DATA(head);
	close(*got);
	socklen_t *len = place(sizeof *len);
	int *value = malloc(sizeof *value);
	*len = sizeof *value;
	CHECK(getsockopt(a, SOL_SOCKET, SO_TYPE, value, len) == 0 && *value == SOCK_SEQPACKET);
	struct mmsghdr *many = calloc(4, sizeof *many);
	for (int i = 0; i < 4; i++)
		many[i].msg_hdr = (struct msghdr){ .msg_iov = from, .msg_iovlen = 1 };
	CHECK(sendmmsg(a, many, 2, 0) == 2 && many[1].msg_len == n / 2);
	CHECK(recvmmsg(b, many, 2, 0, NULL) == 2);
	free(many);
	struct pollfd *poll_for = calloc(1000, sizeof *poll_for);
	for (int i = 0; i < 1000; i++)
		poll_for[i] = (struct pollfd){ .fd = i == 777 ? a : -1, .events = POLLOUT };
	CHECK(poll(poll_for, 1000, 1000) == 1 && poll_for[777].revents == POLLOUT);
	free(poll_for);
	int epoll = epoll_create1(0);
	struct epoll_event *events = calloc(64, sizeof *events);
	events[0] = (struct epoll_event){ .events = EPOLLOUT, .data.u64 = key };
	CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, a, events) == 0);
	CHECK(epoll_wait(epoll, events, 64, 1000) == 1 && events[0].data.u64 == key);
	fd_set *set = malloc(sizeof *set);
	struct timeval *time = malloc(sizeof *time);
	FD_ZERO(set);
	FD_SET(a, set);
	*time = (struct timeval){ .tv_sec = 1 };
	CHECK(select(a + 1, NULL, set, NULL, time) == 1 && FD_ISSET(a, set));
	free(set), free(time), free(events), free(value), free(to), free(from), free(bytes), free(back), free(control), free(in), free(out);
	close(epoll), close(a), close(b);
}

/* One thread writes in pieces, the other reads what it can get: a read that waits holds its memory. */
static void *pipe_writer(void *argument)
{
	int fd = *(int *)argument;
	uint64_t *words = malloc(100000);

	for (uint64_t n = 0; n < 30; n++) {
		for (int i = 0; i < 1000; i++)
			words[i] = number(7, n * 1000 + i);
		for (size_t done = 0; done < 8000;) {
			ssize_t wrote = write(fd, (char *)words + done, 8000 - done);

			CHECK(wrote > 0);
			done += wrote;
		}
		if (n % 8 == 0)
			usleep(2000);
	}
	close(fd);
	free(words);
	return NULL;
}

static void pipes(void)
{
	int *fds = malloc(2 * sizeof *fds);
	pthread_t writer;
	uint64_t *words = malloc(240000 + 65536), seen = 0;

	CHECK(pipe(fds) == 0 && pthread_create(&writer, NULL, pipe_writer, &fds[1]) == 0);
	for (;;) {
		ssize_t got = read(fds[0], (char *)words + seen, 65536);

		CHECK(got >= 0);
		if (got == 0)
			break;
		seen += got;
	}
	CHECK(seen == 240000);
	for (int n = 0; n < 30000; n++)
		CHECK(words[n] == number(7, n));
	CHECK(pthread_join(writer, NULL) == 0);
	close(fds[0]);
	free(words);
	free(fds);
}

/* Two threads take turns on a word of the heap. */
static void *turns(void *argument)
{
	uint32_t *word = argument;
	struct timespec *time = malloc(sizeof *time);

	for (int n = 0; n < 100; n++) {
		while (__atomic_load_n(word, __ATOMIC_SEQ_CST) % 2 == 0) {
			*time = (struct timespec){ .tv_nsec = 100000000 };
			syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, __atomic_load_n(word, __ATOMIC_SEQ_CST) & ~1u, time, NULL, 0);
		}
		__atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	}
	free(time);
	return word;
}

static void futexes(void)
{
	uint32_t *word = malloc(sizeof *word);
	pthread_t thread;
	void *answer;

	*word = 0;
	CHECK(pthread_create(&thread, NULL, turns, word) == 0);
	for (int n = 0; n < 100; n++) {
		while (__atomic_load_n(word, __ATOMIC_SEQ_CST) % 2 == 1)
			syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, __atomic_load_n(word, __ATOMIC_SEQ_CST) | 1u, NULL, NULL, 0);
		__atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	}
	CHECK(pthread_join(thread, &answer) == 0 && answer == word && *word == 200);
	free(word);
}

/* Signals. */
static volatile sig_atomic_t handled, on_stack;
static char *signal_stack;
#define SIGNAL_STACK (64 * 1024)
/* So small a signal stack that the second frame has no room on it is replaced by another. */
static int small;

static void handler(int signal, siginfo_t *info, void *context)
{
	char *bytes = heap + (handled * 4096) % (HEAP - 4096);
	char local;
	int saved = errno;

	(void)context;
	CHECK(signal == SIGUSR1 && info->si_signo == SIGUSR1);
	/* System calls in a handler, with memory that may be away. */
	int fd = open("/dev/zero", O_RDONLY);
	CHECK(fd >= 0);
	static char buffer[8192];
	CHECK(read_all(fd, buffer, sizeof buffer));
	CHECK(clock_gettime(CLOCK_REALTIME, (struct timespec *)buffer) == 0);
	close(fd);
	stack_t now;
	CHECK(sigaltstack(NULL, &now) == 0 && now.ss_sp == signal_stack && now.ss_flags == SS_ONSTACK);
	on_stack = small || (&local >= signal_stack && &local < signal_stack + SIGNAL_STACK);
	(void)*(volatile char *)bytes;
	handled++;
	errno = saved;
}

static sigjmp_buf back;

static void jumper(int signal)
{
	CHECK(signal == SIGUSR2);
	siglongjmp(back, 1);
}

static void *kicker(void *argument)
{
	pthread_t to = *(pthread_t *)argument;

	for (int n = 0; n < 20; n++) {
		pthread_kill(to, SIGUSR1);
		usleep(500);
	}
	return NULL;
}

static void signals(void)
{
	struct sigaction *action = calloc(1, sizeof *action);
	stack_t *stack = calloc(1, sizeof *stack);
	sigset_t *set = malloc(sizeof *set), *old = malloc(sizeof *old);
	pthread_t own = pthread_self(), thread;
	struct timespec *time = malloc(sizeof *time);
	char *bytes = malloc(100000);
	int fds[2];

	signal_stack = malloc(SIGNAL_STACK);
	small = !small;
	*stack = (stack_t){ .ss_sp = signal_stack, .ss_size = small ? 8192 : SIGNAL_STACK };
	CHECK(sigaltstack(stack, NULL) == 0);
	memset(stack, 0, sizeof *stack);
	CHECK(sigaltstack(NULL, stack) == 0 && stack->ss_sp == signal_stack && stack->ss_size == (small ? 8192 : SIGNAL_STACK));
	action->sa_sigaction = handler;
	action->sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
	/* All, the one that uhmm uses as well. */
	sigfillset(&action->sa_mask);
	CHECK(sigaction(SIGUSR1, action, NULL) == 0);
	handled = 0;
	raise(SIGUSR1);
	CHECK(handled == 1 && on_stack);

	/* A read that waits is begun again after the handler. */
	CHECK(pipe(fds) == 0 && pthread_create(&thread, NULL, kicker, &own) == 0);
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		usleep(8000);
		memset(bytes, 'x', 5000);
		_exit(write(fds[1], bytes, 5000) == 5000 ? 0 : 1);
	}
	for (ssize_t done = 0; done < 5000;) {
		ssize_t got = read(fds[0], bytes + done, 100000 - done);

		CHECK(got > 0);
		done += got;
	}
	for (int n = 0; n < 5000; n++)
		CHECK(bytes[n] == 'x');
	int *status = malloc(sizeof *status);
	pid_t waited;
	while ((waited = waitpid(child, status, 0)) == -1 && errno == EINTR)
		;
	CHECK(waited == child && *status == 0);
	CHECK(pthread_join(thread, NULL) == 0);
	close(fds[0]), close(fds[1]);

	/* Without restart it is interrupted; with everything blocked it is not. */
	sigfillset(set);
	CHECK(pthread_sigmask(SIG_BLOCK, set, old) == 0);
	handled = 0;
	raise(SIGUSR1);
	CHECK(handled == 0);
	sigset_t *pending = malloc(sizeof *pending);
	CHECK(sigpending(pending) == 0 && sigismember(pending, SIGUSR1));
	*set = *old;
	errno = 0;
	CHECK(sigsuspend(set) == -1 && errno == EINTR && handled == 1);
	raise(SIGUSR1);
	*time = (struct timespec){ .tv_sec = 5 };
	errno = 0;
	CHECK(ppoll(NULL, 0, time, set) == -1 && errno == EINTR && handled == 2);
	raise(SIGUSR1);
	errno = 0;
	CHECK(pselect(0, NULL, NULL, NULL, time, set) == -1 && errno == EINTR && handled == 3);
	raise(SIGUSR1);
	sigemptyset(set);
	sigaddset(set, SIGUSR1);
	siginfo_t *info = malloc(sizeof *info);
	CHECK(sigtimedwait(set, info, time) == SIGUSR1 && handled == 3);
	CHECK(pthread_sigmask(SIG_SETMASK, old, NULL) == 0);

	/* Out of a handler that interrupts a call that waits, again and again. */
	memset(action, 0, sizeof *action);
	action->sa_handler = jumper;
	CHECK(sigaction(SIGUSR2, action, NULL) == 0 && pipe(fds) == 0);
	struct itimerspec *when = calloc(1, sizeof *when);
	timer_t timer;
	struct sigevent *event = calloc(1, sizeof *event);
	event->sigev_notify = SIGEV_SIGNAL;
	event->sigev_signo = SIGUSR2;
	sigemptyset(set);
	sigaddset(set, SIGUSR2);
	CHECK(timer_create(CLOCK_MONOTONIC, event, &timer) == 0);
	for (volatile int n = 0; n < 40; n++) {
		when->it_value.tv_nsec = 300000;
		if (sigsetjmp(back, 1) == 0) {
			CHECK(timer_settime(timer, 0, when, NULL) == 0);
			for (;;)
				CHECK(read(fds[0], bytes, 100000) == -1);
		}
	}
	timer_delete(timer);
	close(fds[0]), close(fds[1]);
	/* A handler for the signal that uhmm uses is the program's to install, and hears of its own. */
	memset(action, 0, sizeof *action);
	CHECK(sigaction(SIGSYS, NULL, action) == 0 && action->sa_handler == SIG_DFL);
	stack->ss_flags = SS_DISABLE;
	CHECK(sigaltstack(stack, NULL) == 0);
	free(signal_stack);
	free(action), free(stack), free(set), free(old), free(time), free(bytes), free(status), free(pending), free(info), free(when), free(event);
}

/* Children. */
static int run_child(char **arguments, int how)
{
	int *status = malloc(sizeof *status), answer;
	pid_t child;

	if (how == 0) {
		CHECK(posix_spawnp(&child, arguments[0], NULL, NULL, arguments, environ) == 0);
	} else {
		volatile int told = 0;

		child = how == 1 ? vfork() : fork();
		if (child == 0) {
			if (how == 1)
				told = 1;
			execvp(arguments[0], arguments);
			_exit(127);
		}
		CHECK(child > 0 && told == (how == 1));
	}
	while (waitpid(child, status, 0) == -1)
		CHECK(errno == EINTR);
	answer = *status;
	free(status);
	return answer;
}

static void children(void)
{
	/* Arguments and environment on the heap, far apart. */
	char **arguments = malloc(8 * sizeof *arguments), *long_one = malloc(100001);

	memset(long_one, 'y', 100000);
	long_one[100000] = 0;
	for (int how = 0; how < 3; how++) {
		arguments[0] = strdup("sh");
		arguments[1] = strdup("-c");
		arguments[2] = strdup("test ${#1} = 100000 && exit 7");
		arguments[3] = strdup("sh");
		arguments[4] = long_one;
		arguments[5] = NULL;
		int status = run_child(arguments, how);
		if (!WIFEXITED(status) || WEXITSTATUS(status) != 7)
			fprintf(stderr, "the child made in way %d ended with status %#x\n", how, status);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
		for (int n = 0; n < 4; n++)
			free(arguments[n]);
	}
	/* vfork of what is not there: the child's memory is the parent's. */
	arguments[0] = strdup("/no/such/program");
	int status = run_child(arguments, 1);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 127);
	free(arguments[0]);
	free(arguments);
	free(long_one);
	/* A fork that the C library does not know of. */
	pid_t bare = syscall(SYS_fork);
	if (bare == 0) {
		check(quiet, QUIET, 2);
		_exit(9);
	}
	CHECK(bare > 0);
	while (waitpid(bare, &status, 0) == -1)
		CHECK(errno == EINTR);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 9);
	CHECK(WEXITSTATUS(system("exit 3")) == 3);
	FILE *out = popen("echo popen", "r");
	char *line = malloc(100);
	CHECK(out && fgets(line, 100, out) && strcmp(line, "popen\n") == 0 && pclose(out) == 0);
	free(line);
}

/* Threads that are cancelled while they wait, and clean up. */
static int cleaned;

static void clean(void *argument)
{
	*(int *)argument += 1;
}

static void *waits(void *argument)
{
	int *fds = argument;
	char *bytes = malloc(10000);

	pthread_cleanup_push(clean, &cleaned);
	pthread_cleanup_push(free, bytes);
	for (;;)
		CHECK(read(fds[0], bytes, 10000) > 0);
	pthread_cleanup_pop(0);
	pthread_cleanup_pop(0);
	return NULL;
}

static void *nothing(void *argument)
{
	char *bytes = malloc(5000);

	memset(bytes, 1, 5000);
	free(bytes);
	return argument;
}

static void threads(void)
{
	pthread_t thread[8];
	pthread_attr_t attributes;
	void *answer, *stack;
	int fds[2];

	for (int n = 0; n < 8; n++)
		CHECK(pthread_create(&thread[n], NULL, nothing, (void *)(size_t)n) == 0);
	for (int n = 0; n < 8; n++)
		CHECK(pthread_join(thread[n], &answer) == 0 && answer == (void *)(size_t)n);
	CHECK(pipe(fds) == 0);
	cleaned = 0;
	CHECK(pthread_create(&thread[0], NULL, waits, fds) == 0);
	usleep(next() % 3000);
	CHECK(pthread_cancel(thread[0]) == 0 && pthread_join(thread[0], &answer) == 0 && answer == PTHREAD_CANCELED);
	close(fds[0]), close(fds[1]);
	/* A stack on the heap. */
	CHECK(posix_memalign(&stack, 4096, 256 * 1024) == 0);
	CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstack(&attributes, stack, 256 * 1024) == 0);
	CHECK(pthread_create(&thread[0], &attributes, nothing, stack) == 0);
	CHECK(pthread_join(thread[0], &answer) == 0 && answer == stack);
	pthread_attr_destroy(&attributes);
	free(stack);
}

static void others(void)
{
	struct utsname *name = place(sizeof *name);
	CHECK(uname(name) == 0 && strcmp(name->sysname, "Linux") == 0);
	char *cwd = place(4096);
	CHECK(getcwd(cwd, 4096) && cwd[0] == '/');
	struct rusage *usage = place(sizeof *usage);
	CHECK(getrusage(RUSAGE_SELF, usage) == 0);
	char *random = place(300);
	CHECK(syscall(SYS_getrandom, random, 300, 0) == 300);
	cpu_set_t *cpus = place(sizeof *cpus);
	CHECK(sched_getaffinity(0, sizeof *cpus, cpus) == 0 && CPU_COUNT(cpus) > 0);
	char *link = place(4096), *path = text("/proc/self/exe");
	ssize_t len = readlink(path, link, 4095);
	CHECK(len > 0 && link[0] == '/');
	DIR *dir = opendir("/proc/self");
	int seen = 0;
	CHECK(dir);
	for (struct dirent *entry; (entry = readdir(dir));)
		seen += strcmp(entry->d_name, "status") == 0;
	CHECK(seen == 1);
	closedir(dir);
	struct timespec *time = place(sizeof *time);
	*time = (struct timespec){ .tv_nsec = 1000 };
	CHECK(nanosleep(time, NULL) == 0);
	/* What no memory is there for. */
	errno = 0;
	char *volatile nowhere = (char *)8;
	CHECK(write(1, nowhere, 100) == -1 && (errno == EFAULT || errno == EBADF));
	nowhere = (char *)4096;
	errno = 0;
	CHECK(open(nowhere, O_RDONLY) == -1 && errno == EFAULT);
	char *volatile none = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fds[2];
	CHECK(pipe(fds) == 0);
	errno = 0;
	CHECK(write(fds[1], none, 100) == -1 && errno == EFAULT);
	munmap(none, 4096);
	close(fds[0]), close(fds[1]);
	char *bytes = place(20000);
	CHECK(mlock(bytes, 20000) == 0 || errno == ENOMEM || errno == EPERM);
	munlock(bytes, 20000);
}

static double until;

static void *worker(void *argument)
{
	size_t n = (size_t)argument;
	char *path = malloc(100);

	part_bytes = HEAP / 3;
	part = heap + n * part_bytes;
	seed = n;
	snprintf(path, 100, "/tmp/uhmm-calls-%d-%zu", getpid(), n);
	do {
		files(path);
		streams(path);
		sockets();
		pipes();
		futexes();
		others();
		threads();
		if (n == 0)
			signals();
		if (n < 2)
			children();
	} while (now() < until);
	free(path);
	return NULL;
}

int main(int count, char **arguments)
{
	pthread_t thread[2];

	heap = map(HEAP);
	fill(heap, HEAP, 1);
	quiet = map(QUIET);
	fill(quiet, QUIET, 2);
	until = now() + (count > 1 ? atof(arguments[1]) : 2);
	/* Threads without signals: they are sent to one that wants them. */
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (size_t n = 0; n < 2; n++)
		CHECK(pthread_create(&thread[n], NULL, worker, (void *)(n + 1)) == 0);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	worker((void *)0);
	for (int n = 0; n < 2; n++)
		CHECK(pthread_join(thread[n], NULL) == 0);
	puts("all well");
	return 0;
}
