// Calls a kernel with the addresses of its arguments, and describes its parameters, from its C++ type alone.
#pragma once
#include <cstddef>
#include <type_traits>
#include <utility>

// `signature`: a letter a parameter. p pointer, i int, u unsigned, f float, l 64 bits, F Floats.
struct EmulatedKernel {
    const char* name;
    void (*call)(void**);
    const char* signature;
    u32 max_threads;
};

// The kernels of one file, which the build generates from their sources.
struct KernelList {
    const EmulatedKernel* kernels;
    u32 count;
};
extern const KernelList emulated_lists[];
extern const u32 emulated_list_count;

template <class T> constexpr char letter() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, int>) return 'i';
    else if constexpr (std::is_same_v<T, u32>) return 'u';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else if constexpr (std::is_same_v<T, i64> || std::is_same_v<T, u64>) return 'l';
    else if constexpr (std::is_same_v<T, Floats>) return 'F';
    else return '?';
}

template <auto Kernel> struct Entry;
template <class... T, void (*Kernel)(T...)> struct Entry<Kernel> {
    static constexpr char signature[] = {letter<T>()..., 0};
    // The arguments are the host's; the kernel, which is not put in here, is watched.
    template <size_t... I>
    __attribute__((no_sanitize("thread"))) static void with(void** args, std::index_sequence<I...>) {
        Kernel(*(T*)args[I]...);
    }
    __attribute__((no_sanitize("thread"))) static void call(void** args) { with(args, std::index_sequence_for<T...>()); }
};
