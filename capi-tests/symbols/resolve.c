/*
 * ploop_resolve_functions() of a library loaded as old managers load it: each element of the table is the function of its
 * name, and nothing else is written. Usage: resolve LIBRARY NAME..., the names in the table's order.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <ploop/libploop.h>
#include <ploop/dynload.h>

/* As legacy vzctl: the table and 32 pointers more. */
#define ROOM 96

int main(int argc, char **argv)
{
    union {
        struct ploop_functions table;
        void *slot[ROOM];
    } f;
    void (*resolve)(struct ploop_functions *);
    void *library, *mark;
    int i;

    if (argc < 2 || argc - 2 > ROOM)
        return 2;
    library = dlopen(argv[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    *(void **)&resolve = dlsym(library, "ploop_resolve_functions");
    if (!resolve)
        return 1;
    resolve(NULL);
    memset(&f, 0xA5, sizeof(f));
    mark = f.slot[ROOM - 1];
    resolve(&f.table);
    for (i = 0; i < ROOM; i++) {
        char name[128];

        if (i >= argc - 2) {
            if (f.slot[i] != mark) {
                fprintf(stderr, "element %d was written\n", i);
                return 1;
            }
            continue;
        }
        snprintf(name, sizeof(name), "ploop_%s", argv[2 + i]);
        if (!dlsym(library, name) || f.slot[i] != dlsym(library, name)) {
            fprintf(stderr, "element %d is not %s\n", i, name);
            return 1;
        }
    }
    if (f.table.get_last_error()[0] != '\0' || f.table.open_dd(NULL, "x") != SYSEXIT_PARAM)
        return 1;
    return 0;
}
