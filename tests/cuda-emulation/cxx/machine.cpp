// The emulated machine: runs a kernel's blocks in turn, and a block's threads as contexts that take turns.
//
// A thread runs until it meets others (a barrier, an exchange of its warp) or ends. Who goes first is drawn anew, by a
// seed, each time that threads are released: what depends on their order gives different results under different seeds.
//
// Kernels are compiled with -fsanitize=thread, whose calls before every access of memory end here instead of in its run-time
// library. So every access is seen, and checked:
//  - bounds: an address must lie in a live buffer of the device, in the block's shared memory, or on the thread's stack;
//  - initialisation: shared memory is undefined when a block starts, device memory until it is written;
//  - races: two threads touch a word, one of them writing, with no meeting of both in between. Threads of different blocks
//    never meet within a launch.
// An asynchronous copy writes for these rules when it starts (a card may make it at once), and leaves numbers that are none until
// its thread waits for it (a card may make it as late).
// The first violation of a launch is described; the kernel runs on.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef long long i64;
#include "emulation.h"
struct Floats;
#include "registry.h"

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

const size_t STACK = 64 << 10;
const size_t SHARED_MAX = 256 << 10;
const u32 MAX_THREADS = 1024;

enum class State { Ready, AtBarrier, InWarp, Done };

struct Thread {
    void* stack_pointer;
    State state;
    Dim3 index;
    u32 warp_epoch; // meetings of its warp so far
};

struct Warp {
    u32 arrived;
    u32 words[2][32 * 16];
    u32 results[2][32 * 16];
    u32 turn; // meetings so far; the buffers alternate
};

// Who last wrote and who last read a word of two bytes (bf16 neighbours belong to different threads). Bytes: which of them.
struct Access {
    u32 launch;
    u32 block;
    u32 epoch; // barriers passed in the block
    u32 warp_epoch;
    u16 thread;
    u8 bytes;
    bool many; // readers of several threads since the last meeting
};
struct Word {
    Access written, read;
};

const u8 LIVE = 1, DEFINED = 2;

struct Memory {
    u8* base;
    size_t size;
    u8* state;   // LIVE | DEFINED by byte
    Word* words; // by two bytes
};

// A copy that was started and not waited for.
struct Copy {
    u8* to;
    u8 bytes[16];
    u32 group;
};

Memory device, shared;
std::vector<Copy> copies[MAX_THREADS];
u32 copy_groups[MAX_THREADS];
u8* stacks;
Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
u32 shared_bytes, thread_count, current, alive, at_barrier, epoch, block_number, launch_number;
void* scheduler;
u64 random_state;
char message[512];
const char* kernel_name;
void (*entry)(void**);
void** entry_args;

extern "C" char __executable_start, _end;

} // namespace

// Saves the callee's registers on the stack, leaves the stack pointer in *save, and goes on where `load` was left.
#if defined(__x86_64__)
extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");
#elif defined(__aarch64__)
extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    sub sp, sp, #176
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #176
    ret
.size emulated_switch, .-emulated_switch
)");
#else
#error "the emulation knows how to switch contexts on x86-64 and aarch64 only"
#endif

namespace {

void report(const char* what, const void* address, size_t size) {
    if (message[0] != 0) {
        return;
    }
    const char* where = "outside all memory of the device";
    long long offset = (long long)(uintptr_t)address;
    const u8* p = (const u8*)address;
    if (device.base && p >= device.base && p < device.base + device.size) {
        where = "device memory";
        offset = p - device.base;
    } else if (p >= shared.base && p < shared.base + SHARED_MAX) {
        where = "shared memory";
        offset = p - shared.base;
    }
    snprintf(message, sizeof message, "%s: %s: %zu bytes at %lld of %s, block (%u, %u, %u) thread %u", kernel_name,
             what, size, offset, where, blockIdx.x, blockIdx.y, blockIdx.z, current);
}

u32 random_below(u32 n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)((random_state >> 33) % n);
}

void yield() { emulated_switch(&threads[current].stack_pointer, scheduler); }

void thread_main() {
    entry(entry_args);
    threads[current].state = State::Done;
    alive--;
    yield();
    abort(); // a finished thread is never resumed
}

// --- what an access must fulfil -----------------------------------------------------------------------------------

// Whether what `a` did is ordered before what the current thread does now. Every block has a shared memory of its own.
bool ordered(const Access& a, bool in_shared) {
    if (a.launch != launch_number || a.bytes == 0) {
        return true;
    }
    if (a.block != block_number) {
        return in_shared;
    }
    if (a.epoch != epoch) {
        return true;
    }
    if (a.many) {
        return false;
    }
    return a.thread == current || (a.thread / 32 == current / 32 && a.warp_epoch != threads[current].warp_epoch);
}

void check_word(Word& w, bool in_shared, const void* address, size_t size, u8 bytes, bool write) {
    if (!ordered(w.written, in_shared) && (w.written.bytes & bytes)) {
        report(write ? "race of two writes" : "race of a read with a write", address, size);
    }
    if (write && !ordered(w.read, in_shared) && ((w.read.bytes & bytes) || w.read.many)) {
        report("race of a write with a read", address, size);
    }
    Access now = {launch_number, block_number, epoch, threads[current].warp_epoch, (u16)current, bytes, false};
    if (write) {
        w.written = now;
        return;
    }
    // A reader beside others that are not ordered before it: none of them may be forgotten.
    now.many = !ordered(w.read, in_shared);
    now.bytes |= now.many ? w.read.bytes : 0;
    w.read = now;
}

void check_in(Memory& m, const u8* p, size_t size, bool write) {
    const size_t at = p - m.base;
    for (size_t i = at; i < at + size; i++) {
        if (!(m.state[i] & LIVE)) {
            report(write ? "write out of bounds" : "read out of bounds", p, size);
            return;
        }
        if (write) {
            m.state[i] |= DEFINED;
        } else if (!(m.state[i] & DEFINED)) {
            report("read of what nothing wrote", p, size);
            return;
        }
    }
    for (size_t word = at / 2; word <= (at + size - 1) / 2; word++) {
        const u8 bytes = size == 1 ? (u8)(1 << at % 2) : 3;
        check_word(m.words[word], &m == &shared, p, size, bytes, write);
    }
}

void check(const void* address, size_t size, bool write) {
    const u8* p = (const u8*)address;
    if (p >= stacks && p < stacks + STACK * MAX_THREADS) {
        return;
    }
    if (p >= shared.base && p + size <= shared.base + SHARED_MAX) {
        check_in(shared, p, size, write);
    } else if (device.base && p >= device.base && p + size <= device.base + device.size) {
        check_in(device, p, size, write);
    } else if (p < (const u8*)&__executable_start || p >= (const u8*)&_end) {
        report(write ? "write out of bounds" : "read out of bounds", p, size);
    }
}

} // namespace

// --- what kernels call --------------------------------------------------------------------------------------------

extern "C" {

u8* emulated_shared() { return shared.base; }
int emulated_lane() { return (int)(current % 32); }

void emulated_barrier() {
    threads[current].state = State::AtBarrier;
    at_barrier++;
    yield();
}

// All lanes have come: they go on in whatever order the scheduler takes them.
static void meet(u32 warp) {
    warps[warp].turn++;
    warps[warp].arrived = 0;
    const u32 last = warp * 32 + 32 < thread_count ? warp * 32 + 32 : thread_count;
    for (u32 t = warp * 32; t < last; t++) {
        threads[t].state = State::Ready;
        threads[t].warp_epoch++;
    }
}

u64 emulated_exchange(u64 bits, int from) {
    const u32 me = current, warp = me / 32, turn = warps[warp].turn % 2;
    memcpy(&warps[warp].words[turn][2 * (me % 32)], &bits, 8);
    threads[me].state = State::InWarp;
    if (++warps[warp].arrived == 32) {
        meet(warp);
    }
    yield();
    memcpy(&bits, &warps[warp].words[turn][2 * (from % 32)], 8);
    return bits;
}

void emulated_collective(const u32* mine, int words, u32* result, int result_words, void (*work)(const u32*, u32*)) {
    const u32 me = current, warp = me / 32, turn = warps[warp].turn % 2;
    memcpy(&warps[warp].words[turn][words * (me % 32)], mine, 4 * words);
    threads[me].state = State::InWarp;
    if (++warps[warp].arrived == 32) {
        work(warps[warp].words[turn], warps[warp].results[turn]);
        meet(warp);
    }
    yield();
    memcpy(result, &warps[warp].results[turn][result_words * (me % 32)], 4 * result_words);
}

void emulated_copy_async(void* to, const void* from, int inside) {
    if ((uintptr_t)to % 16 || (inside && (uintptr_t)from % 16)) {
        report("asynchronous copy that is not at a multiple of 16", to, 16);
        return;
    }
    Copy copy = {(u8*)to, {0}, copy_groups[current]};
    if (inside) {
        check(from, 16, false);
    }
    check(to, 16, true);
    if (message[0]) {
        return; // one of them may lie nowhere
    }
    if (inside) {
        memcpy(copy.bytes, from, 16);
    }
    memset(to, 0xff, 16);
    copies[current].push_back(copy);
}

void emulated_aligned(const void* p) {
    if ((uintptr_t)p % 16) {
        report("16 bytes that are not at a multiple of 16", p, 16);
    }
}

void emulated_copies_end() { copy_groups[current]++; }

void emulated_copies_wait(int but) {
    std::vector<Copy>& all = copies[current];
    size_t left = 0;
    for (const Copy& copy : all) {
        if (copy.group + but < copy_groups[current]) {
            memcpy(copy.to, copy.bytes, 16);
        } else {
            all[left++] = copy;
        }
    }
    all.resize(left);
}

#define ACCESS(n)                                                                  \
    void __tsan_read##n(void* p) { check(p, n, false); }                           \
    void __tsan_write##n(void* p) { check(p, n, true); }                           \
    void __tsan_unaligned_read##n(void* p) { check(p, n, false); }                 \
    void __tsan_unaligned_write##n(void* p) { check(p, n, true); }                 \
    void __tsan_volatile_read##n(void* p) { check(p, n, false); }                  \
    void __tsan_volatile_write##n(void* p) { check(p, n, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t n) { check(p, n, false); }
void __tsan_write_range(void* p, size_t n) { check(p, n, true); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// --- what the host calls ------------------------------------------------------------------------------------------

const EmulatedKernel* emulated_find(const char* name) {
    for (u32 list = 0; list < emulated_list_count; list++) {
        for (u32 k = 0; k < emulated_lists[list].count; k++) {
            if (strcmp(emulated_lists[list].kernels[k].name, name) == 0) {
                return &emulated_lists[list].kernels[k];
            }
        }
    }
    return nullptr;
}

const char* emulated_signature(const EmulatedKernel* kernel) { return kernel->signature; }

// Zero pages that exist once they are touched.
static void* pages(size_t size) {
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

static bool allocate(Memory& m, size_t size) {
    if (m.base) {
        munmap(m.base, m.size);
        munmap(m.state, m.size);
        munmap(m.words, (m.size + 1) / 2 * sizeof(Word));
    }
    m = Memory{(u8*)pages(size), size, (u8*)pages(size), (Word*)pages((size + 1) / 2 * sizeof(Word))};
    return m.base && m.state && m.words;
}

// Memory of the device: nothing in it may be touched before emulated_mark says so.
u8* emulated_memory(size_t size) { return allocate(device, size) ? device.base : nullptr; }

void emulated_mark(size_t at, size_t size, int live, int defined) {
    memset(&device.state[at], (live ? LIVE : 0) | (defined ? DEFINED : 0), size);
}

// Whether all of a range has been written.
int emulated_defined(size_t at, size_t size) {
    for (size_t i = at; i < at + size; i++) {
        if (!(device.state[i] & DEFINED)) {
            return 0;
        }
    }
    return 1;
}

static void start_block() {
    memset(shared.base, 0xff, shared_bytes);
    memset(shared.state, LIVE, shared_bytes);
    memset(shared.state + shared_bytes, 0, SHARED_MAX - shared_bytes);
    alive = thread_count;
    at_barrier = epoch = 0;
    for (u32 t = 0; t < thread_count; t++) {
        copies[t].clear();
        copy_groups[t] = 0;
        u8* top = stacks + STACK * (t + 1);
        void** sp = (void**)(top - 256);
        memset(sp, 0, 256);
#if defined(__x86_64__)
        // Six registers, then the address to return to; a function is entered with the stack 8 off a multiple of 16.
        sp[6] = (void*)thread_main;
#else
        sp[11] = (void*)thread_main;
#endif
        threads[t] = Thread{sp, State::Ready, {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)}, 0};
    }
    for (u32 w = 0; w < (thread_count + 31) / 32; w++) {
        warps[w].arrived = warps[w].turn = 0;
    }
}

// Runs the threads of a block to their end; false where they wait for each other forever.
static bool run_block() {
    std::vector<u32> order(thread_count);
    for (u32 t = 0; t < thread_count; t++) {
        order[t] = t;
    }
    while (alive > 0) {
        if (random_state != 0) {
            for (u32 t = thread_count - 1; t > 0; t--) {
                std::swap(order[t], order[random_below(t + 1)]);
            }
        }
        bool moved = false;
        for (u32 t : order) {
            if (threads[t].state == State::Ready) {
                moved = true;
                current = t;
                threadIdx = threads[t].index;
                emulated_switch(&scheduler, threads[t].stack_pointer);
            }
        }
        if (moved) {
            continue;
        }
        if (at_barrier < alive || at_barrier == 0) {
            report("threads wait for others that do not come", nullptr, 0);
            return false;
        }
        at_barrier = 0;
        epoch++;
        for (u32 t = 0; t < thread_count; t++) {
            if (threads[t].state == State::AtBarrier) {
                threads[t].state = State::Ready;
            }
        }
    }
    for (u32 t = 0; t < thread_count; t++) {
        if (!copies[t].empty()) {
            report("an asynchronous copy that nothing waited for", copies[t][0].to, 16);
        }
    }
    return true;
}

// Runs a launch; null, or what was wrong with it. Seed 0 keeps the order of threads.
const char* emulated_launch(const EmulatedKernel* kernel, Dim3 grid, Dim3 block, u32 bytes, void** args, u64 seed) {
    static bool ready = false;
    if (!ready) {
        stacks = (u8*)pages(STACK * MAX_THREADS);
        allocate(shared, SHARED_MAX);
        ready = true;
    }
    message[0] = 0;
    const EmulatedKernel& k = *kernel;
    kernel_name = k.name;
    entry = k.call;
    entry_args = args;
    gridDim = grid;
    blockDim = block;
    thread_count = block.x * block.y * block.z;
    if (thread_count == 0 || thread_count > k.max_threads || thread_count % 32 || bytes > SHARED_MAX) {
        snprintf(message, sizeof message, "%s: a block of %u threads (at most %u) with %u bytes of shared memory",
                 k.name, thread_count, k.max_threads, bytes);
        return message;
    }
    shared_bytes = bytes;
    random_state = seed;
    launch_number++;
    block_number = 0;
    for (u32 z = 0; z < grid.z; z++) {
        for (u32 y = 0; y < grid.y; y++) {
            for (u32 x = 0; x < grid.x; x++, block_number++) {
                blockIdx = Dim3{x, y, z};
                start_block();
                if (!run_block()) {
                    return message;
                }
            }
        }
    }
    return message[0] ? message : nullptr;
}

} // extern "C"
