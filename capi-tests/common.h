/*
 * For the C test programs: which library is this, and checks that go on after a failure.
 */
#ifndef CAPI_TESTS_COMMON_H
#define CAPI_TESTS_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Old functions are tested too. */
#define PLOOP_DEPRECATED
#include <ploop/libploop.h>

static int failures;

#define CHECK(expr, want) \
    do { \
        long long got_ = (long long)(expr), want_ = (long long)(want); \
        if (got_ != want_) { \
            failures++; \
            fprintf(stderr, "%s:%d: %s is %lld, want %lld (last error: %s)\n", __FILE__, __LINE__, #expr, got_, \
                    want_, ploop_get_last_error()); \
        } \
    } while (0)

#define CHECK_TRUE(expr) CHECK(!!(expr), 1)

#define CHECK_STR(got, want) \
    do { \
        const char *got_ = (got), *want_ = (want); \
        if (!got_ || strcmp(got_, want_) != 0) { \
            failures++; \
            fprintf(stderr, "%s:%d: %s is \"%s\", want \"%s\"\n", __FILE__, __LINE__, #got, got_ ? got_ : "(NULL)", \
                    want_); \
        } \
    } while (0)

static inline void die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

/* Ends the program unless the library that runs is the file `wanted` (NULL: $PLOOP_TEST_LIBRARY). */
static inline void assert_library(const char *wanted)
{
    const char *(*function)(void) = ploop_get_last_error;
    struct stat a, b;
    Dl_info info;
    void *address;

    if (!wanted && !(wanted = getenv("PLOOP_TEST_LIBRARY")))
        die("PLOOP_TEST_LIBRARY must name the library under test");
    memcpy(&address, &function, sizeof(address));
    /* A program linked with -static has no loader that knows. */
    if (!dladdr(address, &info) || !info.dli_fname)
        info.dli_fname = "/proc/self/exe";
    if (stat(info.dli_fname, &a) || stat(wanted, &b) || a.st_dev != b.st_dev || a.st_ino != b.st_ino)
        die("the library loaded is %s, not %s", info.dli_fname, wanted);
}

#endif
