// Loads, stores, shared addresses and asynchronous copies.
#pragma once

#include "emulator/numbers.h"
#include "emulator/threads.h"

namespace emulated {

// A 32-bit shared address is a distance from one object of this library; alignment is kept.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - dynamic_shared);
}

inline void* shared_pointer(const char* name, uint64_t address, std::size_t bytes) {
  char* pointer = dynamic_shared + static_cast<int32_t>(static_cast<uint32_t>(address));
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

template <typename Address>
inline void* global_pointer(const char*, Address address, std::size_t) {
  return reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(address));
}
inline void* global_pointer(const char*, uint64_t address, std::size_t) {
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}

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

}  // namespace emulated

inline std::size_t __cvta_generic_to_shared(const void* pointer) {
  return emulated::shared_address(pointer);
}
