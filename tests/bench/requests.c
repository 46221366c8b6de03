/* The work of a whole request in plain C: frames with counts, a CPU table and a mirror table, each a radix tree of
 * 512-entry directories with a count of entries in use.  No locks, no notifications, contents not cleared. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct directory {
    uint64_t entry[512];
    struct directory *parent;
    uint32_t slot, count;
} directory;

static directory *cpu, *mirror;
static int32_t *refcount, *mapcount;
static int64_t *free_stack, nfree;

static directory *new_directory(directory *parent, uint32_t slot)
{
    directory *d = calloc(1, sizeof *d);
    d->parent = parent;
    d->slot = slot;
    if (parent) {
        parent->entry[slot] = (uint64_t)d;
        parent->count++;
    }
    return d;
}

static directory *leaf(directory *d, uint64_t address, int allocate)
{
    for (int shift = 39; shift > 12; shift -= 9) {
        uint32_t slot = address >> shift & 511;
        directory *child = (directory *)d->entry[slot];
        if (!child) {
            if (!allocate)
                return NULL;
            child = new_directory(d, slot);
        }
        d = child;
    }
    return d;
}

static void drop_if_empty(directory *d)
{
    while (!d->count && d->parent) {
        directory *parent = d->parent;
        parent->entry[d->slot] = 0;
        parent->count--;
        free(d);
        d = parent;
    }
}

void setup(int64_t nframes)
{
    cpu = new_directory(NULL, 0);
    mirror = new_directory(NULL, 0);
    refcount = calloc(nframes, sizeof *refcount);
    mapcount = calloc(nframes, sizeof *mapcount);
    free_stack = malloc(nframes * sizeof *free_stack);
    for (nfree = 0; nfree < nframes; nfree++)
        free_stack[nfree] = nframes - 1 - nfree;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

double fault_in(uint64_t start, uint64_t end)
{
    double began = now();
    for (uint64_t address = start; address < end;) {
        directory *d = leaf(cpu, address, 1);
        uint64_t next = (address | 0x1fffff) + 1;
        if (next > end)
            next = end;
        for (; address < next; address += 4096) {
            int64_t pfn = free_stack[--nfree];
            refcount[pfn] = mapcount[pfn] = 1;
            d->entry[address >> 12 & 511] = (uint64_t)pfn << 12 | 3;
            d->count++;
        }
    }
    return now() - began;
}

double mirror_range(uint64_t start, uint64_t end)
{
    double began = now();
    for (uint64_t address = start; address < end;) {
        directory *from = leaf(cpu, address, 0), *to = leaf(mirror, address, 1);
        uint64_t next = (address | 0x1fffff) + 1;
        if (next > end)
            next = end;
        for (; address < next; address += 4096) {
            uint64_t *entry = &to->entry[address >> 12 & 511];
            to->count += !*entry;
            *entry = (from->entry[address >> 12 & 511] & ~4095ull) | 20;
        }
    }
    return now() - began;
}

static void zap(directory *root, uint64_t start, uint64_t end, int release)
{
    for (uint64_t address = start; address < end;) {
        directory *d = leaf(root, address, 0);
        uint64_t next = (address | 0x1fffff) + 1;
        if (next > end)
            next = end;
        for (; d && address < next; address += 4096) {
            uint64_t *entry = &d->entry[address >> 12 & 511];
            if (!*entry)
                continue;
            int64_t pfn = *entry >> 12;
            *entry = 0;
            d->count--;
            if (release && (mapcount[pfn]--, !--refcount[pfn]))
                free_stack[nfree++] = pfn;
        }
        if (d)
            drop_if_empty(d);
        address = next;
    }
}

double unmap(uint64_t start, uint64_t end)
{
    double began = now();
    zap(mirror, start, end, 0);
    zap(cpu, start, end, 1);
    return now() - began;
}

double snapshot(uint64_t start, uint64_t end, uint64_t *out)
{
    double began = now();
    for (uint64_t address = start; address < end;) {
        directory *d = leaf(cpu, address, 0);
        uint64_t next = (address | 0x1fffff) + 1;
        if (next > end)
            next = end;
        uint64_t bytes = (next - address) >> 9;
        if (d)
            memcpy(out, &d->entry[address >> 12 & 511], bytes);
        else
            memset(out, 0, bytes);
        out += bytes >> 3;
        address = next;
    }
    return now() - began;
}

double copy_pages(char *to, const char *from, const int64_t *targets, const int64_t *sources, int64_t npages)
{
    double began = now();
    for (int64_t i = 0; i < npages; i++)
        memcpy(to + (targets[i] << 12), from + (sources[i] << 12), 4096);
    return now() - began;
}
