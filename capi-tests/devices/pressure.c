/*
 * pressure FOLDER FILES MIB SEED DEADLINE-SECONDS
 *
 * Dirties as much of the page cache as it can: writes FILES files of MIB MiB each in FOLDER over and over, by write(2) and by
 * a shared mapping in turns, and syncs one of them now and then. Every page names its file, place and pass. A file is compared
 * before it is written again, after its pages were dropped where the kernel does that. Prints "pass N" after each pass over
 * all files, and at the end (SIGTERM or the deadline) compares all of them. Exit 1: an error or a wrong byte.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MIB (1 << 20)

static volatile sig_atomic_t stop;
static uint64_t seed;
static unsigned char buf[MIB], want[MIB];

static void on_term(int s)
{
    (void)s;
    stop = 1;
}

static void die(const char *what, const char *path)
{
    printf("error: %s %s: %s\n", what, path, strerror(errno));
    fflush(stdout);
    _exit(1);
}

static void fill(unsigned char *b, uint64_t file, uint64_t mib, uint64_t pass)
{
    uint64_t x = seed ^ file << 40 ^ mib << 20 ^ pass, *w = (uint64_t *)b;

    for (int i = 0; i < MIB / 8; i++)
        w[i] = x = x * 6364136223846793005ull + 1442695040888963407ull;
}

static void compare(const char *path, int fd, int file, int mibs, uint64_t pass)
{
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    for (int m = 0; m < mibs; m++) {
        if (pread(fd, buf, MIB, (off_t)m * MIB) != MIB)
            die("reading", path);
        fill(want, file, m, pass);
        if (memcmp(buf, want, MIB)) {
            printf("wrong: %s, MiB %d of pass %llu\n", path, m, (unsigned long long)pass);
            fflush(stdout);
            _exit(1);
        }
    }
}

int main(int argc, char **argv)
{
    struct sigaction sa = {.sa_handler = on_term};
    struct timespec t;
    char path[4096];
    uint64_t pass;
    int files, mibs, done = 0;
    time_t end;

    if (argc != 6)
        return 2;
    files = atoi(argv[2]);
    mibs = atoi(argv[3]);
    seed = strtoull(argv[4], NULL, 0);
    clock_gettime(CLOCK_MONOTONIC, &t);
    end = t.tv_sec + atoi(argv[5]);
    sigaction(SIGTERM, &sa, NULL);
    for (pass = 1; !stop && t.tv_sec < end; pass++) {
        for (int f = 0; f < files; f++) {
            snprintf(path, sizeof(path), "%s/pressure%d", argv[1], f);
            int fd = open(path, O_RDWR | O_CREAT, 0600);
            if (fd < 0)
                die("opening", path);
            if (pass > 1)
                compare(path, fd, f, mibs, pass - 1);
            if ((pass + f) % 2) {
                for (int m = 0; m < mibs; m++) {
                    fill(buf, f, m, pass);
                    if (pwrite(fd, buf, MIB, (off_t)m * MIB) != MIB)
                        die("writing", path);
                }
            } else {
                if (ftruncate(fd, (off_t)mibs * MIB))
                    die("growing", path);
                unsigned char *map = mmap(NULL, (size_t)mibs * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
                if (map == MAP_FAILED)
                    die("mapping", path);
                for (int m = 0; m < mibs; m++)
                    fill(map + (size_t)m * MIB, f, m, pass);
                munmap(map, (size_t)mibs * MIB);
            }
            if ((pass + f) % 5 == 0 && fsync(fd))
                die("syncing", path);
            close(fd);
        }
        done = 1;
        printf("pass %llu\n", (unsigned long long)pass);
        fflush(stdout);
        clock_gettime(CLOCK_MONOTONIC, &t);
    }
    for (int f = 0; done && f < files; f++) {
        snprintf(path, sizeof(path), "%s/pressure%d", argv[1], f);
        int fd = open(path, O_RDWR);
        if (fd < 0 || fsync(fd))
            die("syncing", path);
        compare(path, fd, f, mibs, pass - 1);
        close(fd);
    }
    printf("passes %llu\n", (unsigned long long)pass - 1);
    return done ? 0 : 1;
}
