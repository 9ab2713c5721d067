// main() of a driver that runs as its own process, which sanitizers need: FILE ORDER SEED.
// FILE holds a count, as many sizes in bytes (int64 all), then the arrays, which are written back.
// Exit status 3 and a line on stderr: the launch failed. Any other but 0: a sanitizer's report.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "host_runtime.h"

extern "C" int drive(void** arrays);

int main(int, char** argv) {
  std::fstream file(argv[1], std::ios::in | std::ios::out | std::ios::binary);
  int64_t count = 0;
  file.read(reinterpret_cast<char*>(&count), sizeof count);
  std::vector<int64_t> sizes(count);
  file.read(reinterpret_cast<char*>(sizes.data()), count * sizeof(int64_t));
  const auto start_of_arrays = file.tellg();

  // Each on its own, so that the first byte past one belongs to nobody.
  std::vector<std::unique_ptr<char[]>> owners;
  std::vector<void*> arrays;
  for (const int64_t size : sizes) {
    owners.emplace_back(new char[size]);
    arrays.push_back(owners.back().get());
    file.read(owners.back().get(), size);
  }

  emu_configure(std::stoi(argv[2]), std::stoul(argv[3]));
  if (drive(arrays.data()) != 0) {
    std::fprintf(stderr, "%s\n", emu_error());
    return 3;
  }
  file.seekp(start_of_arrays);
  for (int64_t i = 0; i < count; ++i) file.write(owners[i].get(), sizes[i]);
  return 0;
}
