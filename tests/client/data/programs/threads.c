/* Threads that map, move, protect and unmap memory all at once, while the first one forks. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 3, ROUNDS = 40, PIECE = 16 * 4096 };

static void *churn(void *unused)
{
	for (int round = 0; round < ROUNDS; round++) {
		size_t larger = PIECE * 2 * (1 + round % 3);
		char *piece = mmap(NULL, PIECE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		*piece = 1;
		piece = mremap(piece, PIECE, larger, MREMAP_MAYMOVE);
		mprotect(piece, 4096, PROT_READ);
		if (round % 13)
			munmap(piece, larger);
	}
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];

	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, churn, NULL);
	if (!fork()) {
		churn(NULL);
		_exit(0);
	}
	if (!vfork())
		_exit(0);
	if (!fork()) {
		if (!fork())
			_exit(1);
		wait(NULL);
		raise(SIGKILL);
	}
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	while (wait(NULL) > 0)
		;
	if (argc > 1 && !strcmp(argv[1], "last")) { /* another thread is the last one, and returns */
		pthread_create(&threads[0], NULL, churn, NULL);
		pthread_exit(NULL);
	}
	if (argc > 1 && !strcmp(argv[1], "exit")) /* no exit_group at all */
		syscall(SYS_exit, 7);
	return 5;
}
