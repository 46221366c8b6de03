/* What memory calls do depends on what others have set (personality, break, kinds of files), and on faults. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <linux/prctl.h>
#include <unistd.h>

enum { PAGE = 4096, STAT_FIELDS = 51 };

static char *map(size_t pages, int prot)
{
	return mmap(0, pages * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static char *grow(long pages)
{
	char *end = (char *)syscall(SYS_brk, 0);
	return (char *)syscall(SYS_brk, end + pages * PAGE);
}

/* Readable memory is executable: of mmap, mprotect, brk and shmat, of threads and children, until it is undone. */
static void read_implies_exec(void)
{
	char *before = map(3, PROT_READ);
	grow(1);
	personality(READ_IMPLIES_EXEC);
	map(1, PROT_READ);
	map(1, PROT_WRITE);
	mprotect(before + PAGE, PAGE, PROT_READ | PROT_WRITE);
	grow(2);
	shmat(shmget(IPC_PRIVATE, PAGE, IPC_CREAT | 0600), 0, SHM_RDONLY);
	if (!fork()) {
		map(1, PROT_READ);
		_exit(0);
	}
	wait(0);
	personality(0xffffffff);
	map(1, PROT_READ);
	personality(PER_LINUX);
	map(1, PROT_READ);
	grow(1);
	grow(-3);
}

/* The break goes where PR_SET_MM_MAP says, which needs no privilege; brk(2) goes on from there. */
static void move_break(void)
{
	static char text[PAGE];
	unsigned long field[STAT_FIELDS + 1];
	int fd = open("/proc/self/stat", O_RDONLY);
	char *next = text + read(fd, text, PAGE - 1);
	close(fd);
	next = strrchr(text, ')') + 4; /* behind the third field */
	for (int number = 4; number <= STAT_FIELDS; number++)
		field[number] = strtoul(next, &next, 10);
	char *area = map(16, PROT_READ | PROT_WRITE);
	munmap(area + 2 * PAGE, 13 * PAGE);
	struct prctl_mm_map mm = {
		.start_code = field[26], .end_code = field[27], .start_stack = field[28],
		.start_data = field[45], .end_data = field[46], .start_brk = (unsigned long)area,
		.brk = (unsigned long)area + 2 * PAGE - 100, .arg_start = field[48], .arg_end = field[49],
		.env_start = field[50], .env_end = field[51], .exe_fd = -1,
	};
	prctl(PR_SET_MM, PR_SET_MM_MAP, &mm, sizeof mm, 0);
	grow(4);
	grow(-1);
}

/* Flags that are refused where they are not known; pages of a file put where others were. */
static void validate(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT, 0600);
	ftruncate(fd, 4 * PAGE);
	char *file = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE, fd, 0);
	mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0); /* not of this file */
	remap_file_pages(file, PAGE, 0, 2, 0);
}

/* A file of hugetlb is mapped in whole pages; of a segment more may be mapped than there is. */
static void lengths(void)
{
	int huge = memfd_create("huge", MFD_HUGETLB);
	mmap(0, 5 * PAGE, PROT_READ, MAP_SHARED | MAP_NORESERVE, huge, 0);
	int id = shmget(IPC_PRIVATE, 3 * PAGE, IPC_CREAT | 0600);
	char *first = shmat(id, 0, 0);
	shmat(id, 0, 0);
	mremap(first, 3 * PAGE, 9 * PAGE, MREMAP_MAYMOVE);
	shmctl(id, IPC_RMID, 0);
}

/* A file is deleted and made anew, and that one is renamed: three names for two files. */
static void rename_new(const char *path, const char *other)
{
	int fd = open(path, O_RDWR);
	mmap(0, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	unlink(path);
	fd = open(path, O_RDWR | O_CREAT, 0600);
	ftruncate(fd, PAGE);
	map(1, PROT_NONE);
	mmap(0, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	rename(path, other);
	map(1, PROT_NONE);
	mmap(0, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	unlink(other);
}

/* An area with room to grow into, which it does by three pages. */
static char *grown(void)
{
	char *room = map(600, PROT_NONE);
	munmap(room, 600 * PAGE);
	char *top = room + 598 * PAGE;
	mmap(top, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_GROWSDOWN, -1, 0);
	*(volatile char *)(top - 3 * PAGE) = 1;
	return top - 3 * PAGE;
}

/* Of what grew the end does not show all: one has a hole, another is elsewhere. */
static void grow_down(void)
{
	char *cut = grown();
	munmap(cut + PAGE, PAGE);
	char *moved = grown();
	char *target = map(8, PROT_NONE);
	mremap(moved, 5 * PAGE, 5 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target);
}

int main(void)
{
	char path[32], other[40];
	snprintf(path, sizeof path, "/tmp/state-%d", getpid());
	snprintf(other, sizeof other, "%s-renamed", path);
	read_implies_exec();
	validate(path);
	lengths();
	rename_new(path, other);
	grow_down();
	move_break();
	return 0;
}
