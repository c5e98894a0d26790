/*
 * Compacts a mounted disk by its descriptor and by its device, with and without the stop flag.
 * Usage: discard DESCRIPTOR DEVICE MOUNT-POINT LIBRARY    as root
 */
#include "../common.h"

#include <dlfcn.h>

int main(int argc, char **argv)
{
    struct ploop_disk_images_data *di;
    struct ploop_discard_stat before = {0}, after = {0};
    struct ploop_discard_param param = {0};
    int (*stat_by_dev)(const char *, const char *, struct ploop_discard_stat *);
    int (*by_dev)(const char *, const char *, __u64, __u64, const int *);
    int stop = 1, rc;
    void *lib;

    if (argc != 5 || !(lib = dlopen(argv[4], RTLD_NOW)))
        die("usage, or no library: %s", argc == 5 ? dlerror() : "");
    *(void **)&stat_by_dev = dlsym(lib, "ploop_discard_get_stat_by_dev");
    *(void **)&by_dev = dlsym(lib, "ploop_discard_by_dev");
    if (!stat_by_dev || !by_dev)
        die("symbols are missing");
    if (ploop_open_dd(&di, argv[1]))
        die("open: %s", ploop_get_last_error());
    if (ploop_discard_get_stat(di, &before) || stat_by_dev(argv[2], argv[3], &after))
        die("stat: %s", ploop_get_last_error());
    if (before.ploop_size != after.ploop_size || before.balloon_size != 0 || before.data_size > before.ploop_size)
        die("sizes: %lld, %lld", (long long)before.ploop_size, (long long)after.ploop_size);
    param.to_free = 4096;
    if ((rc = ploop_discard(di, &param)) != SYSEXIT_PARAM)
        die("less than a cluster: %d", rc);
    param.to_free = 0;
    param.stop = &stop;
    if ((rc = ploop_discard(di, &param)) || ploop_discard_get_stat(di, &after))
        die("stopped: %d, %s", rc, ploop_get_last_error());
    if (after.image_size != before.image_size)
        die("stopped at once, and the image went from %lld to %lld", (long long)before.image_size, (long long)after.image_size);
    param.stop = NULL;
    if ((rc = ploop_discard(di, &param)) || ploop_discard_get_stat(di, &after))
        die("discard: %d, %s", rc, ploop_get_last_error());
    if (after.image_size > before.image_size - (100 << 20))
        die("the image went from %lld to %lld", (long long)before.image_size, (long long)after.image_size);
    if ((rc = by_dev(argv[2], argv[3], 0, 0, NULL)) || by_dev("/dev/null", argv[3], 0, 0, NULL) == 0)
        die("by device: %d, %s", rc, ploop_get_last_error());
    ploop_close_dd(di);
    printf("%lld -> %lld\n", (long long)before.image_size, (long long)after.image_size);
    return 0;
}
