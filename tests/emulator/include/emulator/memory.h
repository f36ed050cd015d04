// Loads, stores, shared addresses and asynchronous copies.
#pragma once

#include <unordered_map>

#include "emulator/numbers.h"
#include "emulator/threads.h"

namespace emulated {

// Static arrays are anywhere; their alignment is kept.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - shared_memory);
}

// mapa: the address in the CTA of a rank, which takes the place of the upper bits.
constexpr int kRankShift = 27;

inline uint32_t map_address(uint32_t address, uint32_t rank) {
  return (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

// What cvta gives: in a cluster an address has the rank of its own CTA above, as on hardware, which
// shows in a matrix descriptor that takes more than the lowest 18 bits.
inline uint32_t own_address(const void* pointer) {
  uint32_t address = shared_address(pointer);
  return images.size() > 1 ? map_address(address, cluster_rank) : address;
}

inline int32_t distance_of(uint32_t address) {
  return static_cast<int32_t>(address << (32 - kRankShift)) >> (32 - kRankShift);
}

inline void* shared_pointer(const char* name, uint64_t address, std::size_t bytes) {
  uint32_t word = static_cast<uint32_t>(address);
  bool own = images.size() > 1 && word >> kRankShift == cluster_rank + 1;
  char* pointer = shared_memory + (own ? distance_of(word) : static_cast<int32_t>(word));
  auto holds = [&](const char* data, std::size_t size) {
    return pointer >= data && pointer + bytes <= data + size;
  };
  bool inside = holds(dynamic_shared, dynamic_shared_bytes);
  for (const SharedArray& array : shared_arrays) inside |= holds(array.data, array.bytes);
  if (!inside) {
    fail(std::string(name) + ": address must lie inside of a shared array, got " +
         std::to_string(static_cast<int32_t>(address)));
  }
  return pointer;
}

// The CTA of an address from `map_address`, and the pointer that is right while that CTA runs.
struct ClusterTarget {
  uint32_t rank;
  char* pointer;
};

inline ClusterTarget cluster_target(const char* name, uint64_t address, std::size_t bytes) {
  uint32_t word = static_cast<uint32_t>(address), rank = (word >> kRankShift) - 1;
  if (word >> kRankShift == 0 || rank >= images.size()) {
    fail(std::string(name) + ": address must be one of mapa with a rank below " +
         std::to_string(images.size()) + ", got rank " + std::to_string(static_cast<int>(rank)));
  }
  uint32_t distance = static_cast<uint32_t>(distance_of(word));
  return {rank, static_cast<char*>(shared_pointer(name, distance, bytes))};
}

// An address from `map_address`, in the shared memory of a CTA of the cluster that has not left.
inline void* cluster_pointer(const char* name, uint64_t address, std::size_t bytes) {
  auto [rank, pointer] = cluster_target(name, address, bytes);
  if (rank == cluster_rank) return pointer;
  SharedImage& image = images[rank];
  if (image.exited) {
    fail(std::string(name) + ": CTA " + std::to_string(rank) +
         " of the cluster must be there, got one that has exited; let it wait");
  }
  for (std::size_t i = 0; i < shared_arrays.size(); ++i) {
    const SharedArray& array = shared_arrays[i];
    if (pointer < array.data || pointer >= array.data + array.bytes) continue;
    if (i >= image.arrays.size()) break;
    return image.arrays[i].data() + (pointer - array.data);
  }
  if (pointer >= dynamic_shared && pointer < dynamic_shared + image.dynamic.size()) {
    return image.dynamic.data() + (pointer - dynamic_shared);
  }
  fail(std::string(name) + ": CTA " + std::to_string(rank) +
       " of the cluster must have begun; put a barrier.cluster before");
}

// Stores of the generic proxy, of which a product may read none that its thread has not fenced: who
// wrote 16 bytes last, and how many fences it had behind it. Noted where a library has products.
struct GenericWrite {
  const Thread* thread;
  long fences;
};
inline bool writes_are_noted = false;
inline std::vector<std::unordered_map<std::uintptr_t, GenericWrite>> generic_writes;

inline void note_write(const void* pointer, std::size_t bytes) {
  if (!writes_are_noted) return;
  auto first = reinterpret_cast<std::uintptr_t>(pointer);
  for (std::uintptr_t at = first / 16; at <= (first + bytes - 1) / 16; ++at) {
    generic_writes[cluster_rank][at] = {current, current->proxy_fences};
  }
}
inline void fence_proxy(const char*) { ++current->proxy_fences; }

inline void* global_pointer(const char*, const void* address, std::size_t) {
  return const_cast<void*>(address);
}
inline void* global_pointer(const char*, uint64_t address, std::size_t) {
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}
inline void* shared_pointer(const char*, const void* address, std::size_t) {
  return const_cast<void*>(address);
}
template <typename Address>
inline void* shared_target(const char* name, Address address, std::size_t bytes) {
  void* pointer = shared_pointer(name, address, bytes);
  note_write(pointer, bytes);
  return pointer;
}
template <typename Address>
inline void* global_target(const char* name, Address address, std::size_t bytes) {
  return global_pointer(name, address, bytes);
}

inline const void* offset(const void* address, long bytes) {
  return static_cast<const char*>(address) + bytes;
}
inline uint32_t offset(uint32_t address, long bytes) {
  return address + static_cast<uint32_t>(bytes);
}
inline uint64_t offset(uint64_t address, long bytes) { return address + bytes; }

inline void* aligned(const char* name, void* pointer, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes) {
    fail(std::string(name) + ": address must be a multiple of " + std::to_string(bytes) +
         " bytes, got " + std::to_string(reinterpret_cast<std::uintptr_t>(pointer) % 128) +
         " past one of 128");
  }
  return pointer;
}

// Elements of type `Element` in memory; registers may be wider.
template <typename Element, typename... Registers>
inline void read(const char* name, void* pointer, Registers&... registers) {
  auto* from = static_cast<const char*>(
      aligned(name, pointer, sizeof...(Registers) * sizeof(Element)));
  auto take = [&](auto& target) {
    Element element;
    std::memcpy(&element, from, sizeof(Element));
    from += sizeof(Element);
    using Target = std::remove_reference_t<decltype(target)>;
    if constexpr (sizeof(Target) == sizeof(Element)) {
      std::memcpy(&target, &element, sizeof(Element));
    } else {
      target = static_cast<Target>(element);
    }
  };
  (take(registers), ...);
}

template <typename Element, typename... Registers>
inline void write(const char* name, void* pointer, const Registers&... registers) {
  auto* to = static_cast<char*>(aligned(name, pointer, sizeof...(Registers) * sizeof(Element)));
  auto put = [&](const auto& source) {
    if constexpr (sizeof(source) == sizeof(Element)) {
      std::memcpy(to, &source, sizeof(Element));
    } else {
      auto element = static_cast<Element>(source);
      std::memcpy(to, &element, sizeof(Element));
    }
    to += sizeof(Element);
  };
  (put(registers), ...);
}

// Adds to memory, and gives what the first element was.
template <typename Element, typename... Registers>
inline Element add_to(const char* name, void* pointer, Registers... values) {
  auto* to = static_cast<Element*>(aligned(name, pointer, sizeof...(Registers) * sizeof(Element)));
  Element before = *to;
  ((*to = static_cast<Element>(*to + static_cast<Element>(values)), ++to), ...);
  return before;
}

// A copy happens when it is waited for; until then its target holds garbage.
inline void copy_async(const char* name, uint32_t to, const void* from, unsigned bytes,
                       unsigned valid) {
  void* target = aligned(name, shared_pointer(name, to, bytes), bytes);
  aligned(name, const_cast<void*>(from), bytes);
  if (valid > bytes) {
    fail(std::string(name) + ": source bytes must be at most " + std::to_string(bytes) + ", got " +
         std::to_string(valid));
  }
  std::memset(target, kPoison, bytes);
  current->copies.push_back({target, from, bytes, valid, current->group});
}
inline void copy_async(const char* name, uint32_t to, const void* from, unsigned bytes) {
  copy_async(name, to, from, bytes, bytes);
}

inline void commit_copies(const char*) { ++current->group; }

// Completes the copies of all groups before `end`.
inline void complete_copies(long end) {
  auto& copies = current->copies;
  std::size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group >= end) {
      copies[kept++] = copy;
      continue;
    }
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
    note_write(copy.to, copy.bytes);
  }
  copies.resize(kept);
}

inline void wait_for_copies(const char*, int pending) {
  complete_copies(current->group - pending);
}
inline void wait_for_all_copies(const char*) { complete_copies(current->group + 1); }

}  // namespace emulated

template <typename T>
inline T atomicAdd(T* pointer, T value) {
  T before = *pointer;
  *pointer = before + value;
  return before;
}
inline std::size_t __cvta_generic_to_shared(const void* pointer) {
  return emulated::own_address(pointer);
}
