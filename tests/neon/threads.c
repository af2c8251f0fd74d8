/* The smallest program that starts a thread: some hosts cannot run it under qemu-user, and then no Rust test either. */
#include <pthread.h>

static void *thread(void *result) {
    *(int *)result = 0;
    return 0;
}

int main(void) {
    int result = 1;
    pthread_t id;
    return pthread_create(&id, 0, thread, &result) || pthread_join(id, 0) || result;
}
