/* Maps and unmaps, then ends by a signal, in the way that its argument names. */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE, PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS };

static void map_and_unmap(void)
{
	char *area = mmap(NULL, 8 * PAGE, RW, PRIVATE, -1, 0);

	munmap(area + PAGE, PAGE);
	mprotect(area + 2 * PAGE, PAGE, PROT_READ);
}

static void *fault(void *unused)
{
	map_and_unmap();
	*(volatile int *)16 = 1;
	return unused;
}

static void handle(int number)
{
	map_and_unmap();
	signal(number, SIG_DFL);
	raise(number);
}

int main(int count, char **arguments)
{
	const char *how = arguments[1];
	sigset_t all;
	pthread_t thread;

	map_and_unmap();
	if (!strcmp(how, "fault"))
		fault(NULL);
	if (!strcmp(how, "blocked")) {
		signal(SIGSEGV, handle);
		sigfillset(&all);
		sigprocmask(SIG_BLOCK, &all, NULL);
		fault(NULL);
	}
	if (!strcmp(how, "abort"))
		abort();
	if (!strcmp(how, "raise"))
		raise(SIGRTMIN + 3);
	if (!strcmp(how, "kill"))
		kill(getpid(), SIGKILL);
	if (!strcmp(how, "child") && !fork()) {
		kill(getppid(), SIGKILL);
		_exit(0);
	}
	if (!strcmp(how, "thread"))
		pthread_create(&thread, NULL, fault, NULL);
	if (!strcmp(how, "handler")) {
		signal(SIGTERM, handle);
		raise(SIGTERM);
	}
	printf("%d\n", getpid());
	fflush(stdout);
	if (!strcmp(how, "busy"))
		for (;;)
			map_and_unmap();
	usleep(400000);
	puts("idle");
	fflush(stdout);
	pause();
}
