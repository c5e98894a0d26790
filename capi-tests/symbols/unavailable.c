/*
 * Functions that the library exports without having them yet: a call fails, and the last error names the function.
 * Usage: unavailable LIBRARY NAME...
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <ploop/libploop.h>

int main(int argc, char **argv)
{
    const char *(*last_error)(void);
    void *library;
    int i;

    if (argc < 2)
        return 2;
    library = dlopen(argv[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    *(void **)&last_error = dlsym(library, "ploop_get_last_error");
    for (i = 2; i < argc; i++) {
        /* More arguments than any of them has; none is looked at. */
        int (*function)(void *, long, long, long, long);
        int rc;

        *(void **)&function = dlsym(library, argv[i]);
        if (!function) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        rc = function(NULL, 0, 0, 0, 0);
        if (rc != SYSEXIT_PARAM || !strstr(last_error(), argv[i])) {
            fprintf(stderr, "%s: %d instead of %d, last error '%s'\n", argv[i], rc, SYSEXIT_PARAM, last_error());
            return 1;
        }
    }
    return 0;
}
