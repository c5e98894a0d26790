/*
 * hot FILE OFFSET THREADS SECONDS [read|write]
 *
 * Threads rewrite three own blocks each with direct I/O and read them back at once, so that an old write that lands over
 * a newer one is seen (a whole-pass verifier can miss it). Every block names its thread, place and pass. Prints operations
 * slower than 20 ms as "slow START SECONDS" on CLOCK_MONOTONIC, errors, wrong blocks, and a last line
 * "ops N errors N wrong N max SECONDS". Ends after SECONDS or SIGTERM; exit 1 when anything went wrong.
 * "read": only reads a block of each thread over and over (for read-only devices).
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 3

static const char *file;
static long long base;
static int reader;
static volatile sig_atomic_t stop;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long long ops, errors, wrong;
static double longest;

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void on_term(int s)
{
    (void)s;
    stop = 1;
}

static void fill(uint64_t *b, uint64_t thread, uint64_t place, uint64_t pass)
{
    uint64_t x = thread << 48 ^ place << 40 ^ pass;

    for (int i = 0; i < BLOCK / 8; i += 4) {
        b[i] = thread;
        b[i + 1] = place;
        b[i + 2] = pass;
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        b[i + 3] = x;
    }
}

static void done(double began, double ended, int failed, const char *what, long long at)
{
    double took = ended - began;

    pthread_mutex_lock(&lock);
    ops++;
    if (took > longest)
        longest = took;
    if (took > 0.020)
        printf("slow %.6f %.6f\n", began, took);
    if (failed) {
        errors++;
        if (errors < 50)
            printf("error at %.6f: %s at %lld: %s\n", ended, what, at, strerror(failed));
    }
    fflush(stdout);
    pthread_mutex_unlock(&lock);
}

static void *work(void *arg)
{
    uint64_t me = (uintptr_t)arg, pass = 0, seen[BLOCKS] = {0};
    void *mem, *back;
    int fd = open(file, (reader ? O_RDONLY : O_RDWR) | O_DIRECT);

    if (fd < 0 || posix_memalign(&mem, BLOCK, BLOCK) || posix_memalign(&back, BLOCK, BLOCK)) {
        printf("error: open %s: %s\n", file, strerror(errno));
        pthread_mutex_lock(&lock);
        errors++;
        pthread_mutex_unlock(&lock);
        return NULL;
    }
    while (!stop) {
        uint64_t place = pass % BLOCKS;
        long long at = base + (long long)(me * BLOCKS + place) * BLOCK;
        double began;
        ssize_t n;

        pass++;
        if (!reader) {
            fill(mem, me, place, pass);
            began = now();
            n = pwrite(fd, mem, BLOCK, at);
            done(began, now(), n == BLOCK ? 0 : n < 0 ? errno : EIO, "write", at);
            if (n == BLOCK)
                seen[place] = pass;
        }
        began = now();
        n = pread(fd, back, BLOCK, at);
        done(began, now(), n == BLOCK ? 0 : n < 0 ? errno : EIO, "read", at);
        if (n == BLOCK && !reader && seen[place] == pass && memcmp(mem, back, BLOCK)) {
            uint64_t *b = back;

            pthread_mutex_lock(&lock);
            wrong++;
            if (wrong < 50)
                printf("wrong at %.6f: block at %lld: thread %llu place %llu pass %llu, wanted %llu %llu %llu\n", now(), at,
                       (unsigned long long)b[0], (unsigned long long)b[1], (unsigned long long)b[2], (unsigned long long)me,
                       (unsigned long long)place, (unsigned long long)pass);
            pthread_mutex_unlock(&lock);
        }
    }
    close(fd);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[256];
    int count;
    double end;

    if (argc < 5)
        return 2;
    file = argv[1];
    base = atoll(argv[2]);
    count = atoi(argv[3]);
    end = now() + atof(argv[4]);
    reader = argc > 5 && !strcmp(argv[5], "read");
    if (count < 1 || count > 256)
        return 2;
    signal(SIGTERM, on_term);
    for (int i = 0; i < count; i++)
        pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)i);
    while (!stop && now() < end)
        usleep(20000);
    stop = 1;
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    printf("ops %llu errors %llu wrong %llu max %.6f\n", ops, errors, wrong, longest);
    return errors || wrong || !ops;
}
