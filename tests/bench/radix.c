/*
 * The yardstick of bench_page_table.py: a page table as a C programmer writes it.
 *
 * Four levels of directories of 512 entries, allocated one by one, each with a count of its entries in use and a link
 * to its parent, freed when the count falls to zero. Freed directories are kept in a list, as a slab cache would, and
 * zeroed when they are taken. Every function walks from the root once per directory of a range, or once per address
 * of a batch, and gives the nanoseconds that it took.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAGE_SHIFT 12
#define BITS 9
#define ENTRIES 512
#define MASK (ENTRIES - 1)
#define ROOT_SHIFT 39
#define LEAF_SHIFT 21

struct directory {
	uint64_t entry[ENTRIES];
	struct directory *parent;
	uint32_t slot;
	uint32_t count;
};

struct table {
	struct directory *root;
	struct directory *free;
	uint64_t directories;
};

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static struct directory *allocate(struct table *table, struct directory *parent, uint32_t slot)
{
	struct directory *directory = table->free;

	if (directory)
		table->free = directory->parent;
	else
		directory = aligned_alloc(64, (sizeof(*directory) + 63) & ~63UL);
	memset(directory, 0, sizeof(*directory));
	directory->parent = parent;
	directory->slot = slot;
	if (parent) {
		parent->entry[slot] = (uintptr_t)directory;
		parent->count++;
	}
	table->directories++;
	return directory;
}

static void put(struct table *table, struct directory *directory)
{
	while (!directory->count && directory->parent) {
		struct directory *parent = directory->parent;

		parent->entry[directory->slot] = 0;
		parent->count--;
		directory->parent = table->free;
		table->free = directory;
		table->directories--;
		directory = parent;
	}
}

static inline struct directory *leaf(const struct table *table, uint64_t address)
{
	struct directory *directory = table->root;

	for (int shift = ROOT_SHIFT; shift >= LEAF_SHIFT && directory; shift -= BITS)
		directory = (struct directory *)directory->entry[address >> shift & MASK];
	return directory;
}

static inline struct directory *leaf_allocate(struct table *table, uint64_t address)
{
	struct directory *directory = table->root;

	for (int shift = ROOT_SHIFT; shift >= LEAF_SHIFT; shift -= BITS) {
		uint32_t slot = address >> shift & MASK;
		struct directory *child = (struct directory *)directory->entry[slot];

		directory = child ? child : allocate(table, directory, slot);
	}
	return directory;
}

static inline uint64_t leaf_end(uint64_t address, uint64_t end)
{
	uint64_t next = (address | ((1UL << LEAF_SHIFT) - 1)) + 1;

	return next < end ? next : end;
}

struct table *radix_new(void)
{
	struct table *table = calloc(1, sizeof(*table));

	table->root = allocate(table, NULL, 0);
	return table;
}

void radix_free(struct table *table)
{
	while (table->free) {
		struct directory *next = table->free->parent;

		free(table->free);
		table->free = next;
	}
	free(table->root);
	free(table);
}

uint64_t radix_directories(const struct table *table)
{
	return table->directories;
}

double radix_populate(struct table *table, uint64_t start, uint64_t end, const uint64_t *entries)
{
	double began = now();

	for (uint64_t next; start < end; start = next) {
		struct directory *directory = leaf_allocate(table, start);
		uint64_t *entry = &directory->entry[start >> PAGE_SHIFT & MASK];
		uint64_t number;

		next = leaf_end(start, end);
		number = (next - start) >> PAGE_SHIFT;
		for (uint64_t i = 0; i < number; i++) {
			directory->count += !entry[i];
			entry[i] = entries[i];
		}
		entries += number;
	}
	return now() - began;
}

double radix_lookup(struct table *table, uint64_t start, uint64_t end, uint64_t *out)
{
	double began = now();

	for (uint64_t next; start < end; start = next) {
		struct directory *directory = leaf(table, start);
		uint64_t number;

		next = leaf_end(start, end);
		number = (next - start) >> PAGE_SHIFT;
		if (directory)
			memcpy(out, &directory->entry[start >> PAGE_SHIFT & MASK], number * sizeof(*out));
		else
			memset(out, 0, number * sizeof(*out));
		out += number;
	}
	return now() - began;
}

double radix_protect(struct table *table, uint64_t start, uint64_t end, uint64_t mask)
{
	double began = now();

	for (uint64_t next; start < end; start = next) {
		struct directory *directory = leaf(table, start);

		next = leaf_end(start, end);
		if (directory) {
			uint64_t *entry = &directory->entry[start >> PAGE_SHIFT & MASK];
			uint64_t number = (next - start) >> PAGE_SHIFT;

			for (uint64_t i = 0; i < number; i++)
				entry[i] &= mask;
		}
	}
	return now() - began;
}

double radix_clear(struct table *table, uint64_t start, uint64_t end)
{
	double began = now();

	for (uint64_t next; start < end; start = next) {
		struct directory *directory = leaf(table, start);

		next = leaf_end(start, end);
		if (directory) {
			uint64_t *entry = &directory->entry[start >> PAGE_SHIFT & MASK];
			uint64_t number = (next - start) >> PAGE_SHIFT;
			uint32_t used = 0;

			for (uint64_t i = 0; i < number; i++) {
				used += entry[i] != 0;
				entry[i] = 0;
			}
			directory->count -= used;
			put(table, directory);
		}
	}
	return now() - began;
}

double radix_store_many(struct table *table, const uint64_t *addresses, const uint64_t *entries, uint64_t number)
{
	double began = now();

	for (uint64_t i = 0; i < number; i++) {
		struct directory *directory = leaf_allocate(table, addresses[i]);
		uint64_t *entry = &directory->entry[addresses[i] >> PAGE_SHIFT & MASK];

		directory->count += !*entry;
		*entry = entries[i];
	}
	return now() - began;
}

double radix_lookup_many(struct table *table, const uint64_t *addresses, uint64_t *out, uint64_t number)
{
	double began = now();

	for (uint64_t i = 0; i < number; i++) {
		struct directory *directory = leaf(table, addresses[i]);

		out[i] = directory ? directory->entry[addresses[i] >> PAGE_SHIFT & MASK] : 0;
	}
	return now() - began;
}

double radix_clear_many(struct table *table, const uint64_t *addresses, uint64_t number)
{
	double began = now();

	for (uint64_t i = 0; i < number; i++) {
		struct directory *directory = leaf(table, addresses[i]);

		if (directory) {
			uint64_t *entry = &directory->entry[addresses[i] >> PAGE_SHIFT & MASK];

			directory->count -= *entry != 0;
			*entry = 0;
			put(table, directory);
		}
	}
	return now() - began;
}
