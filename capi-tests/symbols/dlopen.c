/*
 * Loads the library in a thread, resolves every symbol named on the command line, uses some, unloads it while the thread
 * lives on, several times. Not linked with the library: old managers load it this way.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int count;
static char **names;
static const char *library;

static void *fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, dlerror());
    return (void *)what;
}

static void *use(void *unused)
{
    const char *(*last_error)(void);
    int (*generate)(char *, int), (*log_file)(const char *);
    void (*verbose)(int), (*cancel)(void);
    char guid[39];
    void *handle;
    int i;

    (void)unused;
    handle = dlopen(library, RTLD_LAZY);
    if (!handle)
        return fail("dlopen");
    for (i = 0; i < count; i++)
        if (!dlsym(handle, names[i]))
            return fail(names[i]);
    *(void **)&last_error = dlsym(handle, "ploop_get_last_error");
    *(void **)&generate = dlsym(handle, "ploop_uuid_generate");
    *(void **)&log_file = dlsym(handle, "ploop_set_log_file");
    *(void **)&verbose = dlsym(handle, "ploop_set_verbose_level");
    *(void **)&cancel = dlsym(handle, "ploop_cancel_operation");
    verbose(-2);
    cancel();
    if (last_error()[0] != '\0')
        return fail("a new thread has a last error");
    if (generate(guid, sizeof(guid)) != 0 || strlen(guid) != 38)
        return fail("ploop_uuid_generate");
    if (generate(guid, 38) != 38 || last_error()[0] == '\0')
        return fail("an error leaves no text");
    if (log_file("/nonexistent/folder/log") != -1)
        return fail("ploop_set_log_file");
    if (dlclose(handle))
        return fail("dlclose");
    return NULL;
}

int main(int argc, char **argv)
{
    int round;

    if (argc < 3)
        return 2;
    library = argv[1];
    count = argc - 2;
    names = argv + 2;
    for (round = 0; round < 20; round++) {
        pthread_t thread;
        void *result;

        if (pthread_create(&thread, NULL, use, NULL) || pthread_join(thread, &result))
            return 2;
        if (result)
            return 1;
    }
    if (use(NULL))
        return 1;
    return 0;
}
